"""What pixels become before a tower sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Normal(NamedTuple):
    """(x * scale - mean) / std of each colour, in float32, as Hugging Face's image processors
    compute it."""

    scale: float
    """Of a pixel of 0 to 255."""
    mean: tuple[float, ...]
    """By channel."""
    std: tuple[float, ...]
    """By channel."""

    def apply(self, patches: Any) -> Any:
        """patches [P, C * p * p] float32, channels first -> the same, normalized. Of NumPy or
        traced arrays."""
        count = patches.shape[0]
        mean, std = (np.asarray(x, np.float32)[:, None] for x in (self.mean, self.std))
        by_channel = patches.reshape(count, len(self.mean), -1)
        scaled = by_channel * np.float32(self.scale)
        return ((scaled - mean) / std).reshape(count, -1)
