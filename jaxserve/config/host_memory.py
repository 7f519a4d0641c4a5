"""How much host memory is for evicted KV pages."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.options import Options


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """A number of bytes, or where that is 0 a ratio."""

    ratio: float
    """Of the bytes to those of the pool on the device."""
    size: int
    """Bytes."""

    @classmethod
    def of(cls, options: Options) -> HostMemory | None:
        """As the options ask; None: pages that leave the device are forgotten."""
        if not options.enable_hierarchical_cache:
            return None
        return cls(options.hicache_ratio, int(options.hicache_size * 1e9))

    @property
    def name(self) -> str:
        """The option that decides, and its value."""
        if self.size:
            return f"hicache_size={self.size / 1e9:g} (GB)"
        return f"hicache_ratio={self.ratio:g}"

    def num_bytes(self, device_bytes: int) -> int:
        """Beside a pool of `device_bytes`."""
        return self.size or int(self.ratio * device_bytes)
