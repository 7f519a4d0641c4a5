"""Named shapes for kv_write: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """kv_heads K, head_dim H, page_size S, pages P, tokens T, dropped: how many of them are out of
    range."""

    name: str
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    tokens: int
    dropped: int = 0

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(k_pages, v_pages, k, v, slots), random; slots of dropped tokens repeat."""
        rng = np.random.default_rng(seed)
        cache = (self.pages, self.page_size, self.kv_heads, self.head_dim)
        new = (self.tokens, self.kv_heads, self.head_dim)
        arrays = [
            rng.standard_normal(shape, dtype=np.float32).astype(dtype)
            for shape in (cache, cache, new, new)
        ]
        capacity = self.pages * self.page_size
        slots = rng.permutation(capacity)[: self.tokens].astype(np.int32)
        out = rng.choice(self.tokens, self.dropped, replace=False)
        slots[out] = rng.choice(np.asarray([capacity, capacity + 7], np.int32), self.dropped)
        return (*arrays, slots)


EDGES = (
    Case("llama-8b", 8, 128, 64, 3, 6),
    Case("qwen-0.5b", 2, 64, 64, 2, 9, dropped=3),
    Case("smollm", 3, 64, 16, 5, 16, dropped=7),
    Case("head dim 80", 2, 80, 16, 4, 5, dropped=1),
    Case("one token", 1, 64, 16, 2, 1),
    Case("all dropped", 2, 64, 16, 2, 8, dropped=8),
    Case("every slot", 1, 64, 16, 2, 32),
)

LARGE = (
    Case("llama-8b T=4096", 8, 128, 64, 512, 4096, dropped=100),
    Case("llama-8b B=64", 8, 128, 64, 2048, 64),
    Case("qwen-0.5b T=256", 2, 64, 64, 512, 256, dropped=13),
)
"""Only on a device: interpreting them would take minutes."""
