"""Named shapes for range_attention: real towers, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """times B, patches S, heads N, head_dim H. lengths: of each B, patches that see each other, one
    run behind the other; what is left of S sees nothing. None: a call without ranges. most: as the
    call says it. alone: what is left sees itself. size_of: typical magnitude of q and k."""

    name: str
    heads: int
    head_dim: int
    patches: int
    lengths: tuple[tuple[int, ...], ...] | None = None
    times: int = 1
    most: int | None = None
    alone: bool = False
    scale: float | None = None
    size_of: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return {"most": self.most, "scale": self.scale}

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray | None, ...]:
        """(q, k, v, starts, ends), random."""
        rng = np.random.default_rng(seed)
        times = self.times if self.lengths is None else len(self.lengths)
        shape = times, self.patches, self.heads, self.head_dim
        q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
        arrays = tuple(x.astype(dtype) for x in (self.size_of * q, self.size_of * k, v))
        if self.lengths is None:
            return (*arrays, None, None)
        each = [runs(x, self.patches, alone=self.alone) for x in self.lengths]
        return (*arrays, *(np.stack(x) for x in zip(*each, strict=True)))


def runs(
    lengths: tuple[int, ...], patches: int, *, alone: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """starts, ends [patches] int32 of runs of patches, each of which sees its run."""
    left = patches - sum(lengths)
    sizes = np.asarray((*lengths, *(1,) * left), np.int32)
    behind = np.cumsum(sizes, dtype=np.int32)
    starts, ends = np.repeat(behind - sizes, sizes), np.repeat(behind, sizes)
    if left and not alone:
        ends[-left:] = starts[-left:]
    return starts, ends


def windows(height: int, width: int, side: int) -> tuple[int, ...]:
    """Patches of each window of a picture of height x width patches, by rows of windows."""
    down, across = (
        [min(side, size - at) for at in range(0, size, side)] for size in (height, width)
    )
    return tuple(a * b for a in down for b in across)


EDGES = (
    Case("qwen2.5-vl", 2, 80, 150, ((100, 30),), alone=True),
    Case("siglip", 2, 72, 81, times=3),
    Case("clip", 2, 64, 65, times=2),
    Case("head dim 96", 2, 96, 70, ((70,),)),
    Case("head dim 128", 1, 128, 130, ((7, 123),)),
    Case("head dim 256", 1, 256, 70, ((64, 5),)),
    Case("head dim 8", 2, 8, 40, ((30, 10),)),
    Case("head dim 100", 1, 100, 20, times=1),
    Case("one patch", 1, 64, 1, ((1,),)),
    Case("one patch a tile", 2, 64, 1, times=3),
    Case("nothing seen", 2, 64, 70, ((),)),
    Case("padding sees nothing", 2, 80, 200, ((60, 9),)),
    Case("two rows of ranges", 2, 64, 100, ((64, 36), (3, 1, 50))),
    Case("a whole picture", 1, 64, 300, ((300,),)),
    Case("blocks' edges", 1, 64, 320, ((63, 1, 65, 127, 64),)),
    Case("many short", 1, 80, 170, ((1, 2, 3, 40, 1, 16, 16, 4, 64, 20),), alone=True),
    Case("windows", 2, 80, 200, ((64, 64, 16, 9, 4, 36),), most=64, alone=True),
    Case("windows and nothing", 1, 80, 150, ((16, 3, 16, 1, 9, 16, 5, 4),), most=16),
    Case("windows of one", 1, 64, 33, ((1,) * 33,), most=1),
    Case("wide windows", 1, 64, 210, ((130, 70),), most=130, alone=True),
    Case("a scale", 1, 64, 90, ((90,),), scale=0.5),
    Case("large scores", 1, 64, 100, ((40, 50),), size_of=6.0),
)
_PICTURE = 74 * 74

LARGE = (
    Case("qwen2.5-vl picture", 16, 80, 6144, ((_PICTURE,),), alone=True),
    Case("qwen2.5-vl windows", 16, 80, 6144, (windows(74, 74, 8),), most=64, alone=True),
    Case("qwen2.5-vl pictures", 16, 80, 4096, ((1024, 60, 2000, 4, 900),), alone=True),
    Case("qwen3-vl picture", 16, 72, 4096, ((4096,),)),
    Case("gemma-3 tile", 16, 72, 4096),
    Case("llava tiles", 16, 64, 577, times=4),
    Case("smolvlm tiles", 12, 64, 1024, times=9),
    Case("head dim 128", 8, 128, 1500, ((700, 600),), alone=True),
    Case("head dim 96", 8, 96, 1500, ((700, 600),)),
    Case("head dim 256", 4, 256, 1000, ((333, 600),)),
)
"""Only on a device. The reference takes all scores of a case at once: a few GB."""
