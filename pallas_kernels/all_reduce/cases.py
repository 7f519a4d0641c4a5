"""Named shapes for all_reduce: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """rows B, size D."""

    name: str
    rows: int
    size: int
    eps: float = 1e-6

    def inputs(self, seed: int, ranks: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(parts [n, B, D], residual, norm), random."""
        rng = np.random.default_rng(seed)
        shape = self.rows, self.size
        parts = rng.standard_normal((ranks, *shape)).astype(dtype)
        residual = rng.standard_normal(shape).astype(dtype)
        return parts, residual, (1 + 0.3 * rng.standard_normal(self.size)).astype(dtype)

    def integers(self, seed: int, ranks: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """As `inputs`, small integers: every order of summing is exact, and every rounding."""
        rng = np.random.default_rng(seed)
        parts = rng.integers(-9, 10, (ranks, self.rows, self.size)).astype(dtype)
        residual = rng.integers(-9, 10, (self.rows, self.size)).astype(dtype)
        return parts, residual, rng.integers(1, 4, self.size).astype(dtype)


EDGES = (
    Case("one row", 1, 64),
    Case("qwen-0.5b", 5, 896),
    Case("smollm", 16, 576),
    Case("odd width", 3, 100),
    Case("more rows than blocks", 131, 128, eps=1e-5),
)

LARGE = (
    Case("llama-8b B=1", 1, 4096),
    Case("llama-8b B=64", 64, 4096),
    Case("llama-8b B=256", 256, 4096),
    Case("llama-8b T=512", 512, 4096),
    Case("llama-8b T=2048", 2048, 4096),
    Case("qwen-0.5b B=200", 200, 896),
    Case("qwen-3b B=8", 8, 2560),
    Case("qwen-14b B=33", 33, 5120),
    Case("llama-70b B=129", 129, 8192),
)
"""Only on devices."""
