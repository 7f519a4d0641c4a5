"""Named shapes for add_norm: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """tokens T, size D. size_of: typical magnitude of x and y."""

    name: str
    tokens: int
    size: int
    size_of: float = 1.0
    eps: float = 1e-6

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(x, y, norm), random."""
        rng = np.random.default_rng(seed)
        x, y = (
            (self.size_of * rng.standard_normal((self.tokens, self.size))).astype(dtype)
            for _ in range(2)
        )
        norm = (1 + 0.3 * rng.standard_normal(self.size)).astype(dtype)
        return x, y, norm


EDGES = (
    Case("one token", 1, 64),
    Case("qwen-0.5b", 5, 896),
    Case("smollm", 16, 576),
    Case("odd width", 3, 100),
    Case("tiny numbers", 4, 128, size_of=1e-4, eps=1e-5),
    Case("large numbers", 4, 128, size_of=1e3),
)

LARGE = (
    Case("llama-8b B=256", 256, 4096),
    Case("llama-8b T=8192", 8192, 4096),
    Case("qwen-0.5b B=256", 256, 896),
    Case("qwen-0.5b T=2047", 2047, 896),
    Case("llama-70b", 33, 8192),
)
"""Only on a device."""
