"""Named shapes for paged_decode: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels.random_cache import random_cache


@dataclasses.dataclass(frozen=True)
class Case:
    """heads N, kv_heads K, head_dim H, page_size S, lengths [B]; width: page-table columns, None
    for one more than the longest row needs."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    lengths: tuple[int, ...]
    window: int | None = None
    width: int | None = None

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(q, k_pages, v_pages, page_table, lengths), random, unwritten slots NaN."""
        rng = np.random.default_rng(seed)
        cache = random_cache(
            rng, self.lengths, page_size=self.page_size, kv_heads=self.kv_heads,
            head_dim=self.head_dim, dtype=dtype, width=self.width,
        )  # fmt: skip
        shape = (len(self.lengths), self.heads, self.head_dim)
        q = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        return (q, *cache, np.asarray(self.lengths, np.int32))


EDGES = (
    Case("llama-8b", 32, 8, 128, 64, (70, 1)),
    Case("qwen-0.5b", 14, 2, 64, 64, (65, 0, 128)),
    Case("smollm", 9, 3, 64, 16, (1, 16, 17, 33, 0)),
    Case("one head a group", 4, 4, 64, 16, (30, 5)),
    Case("group of 8", 8, 1, 128, 16, (48, 31)),
    Case("head dim 80", 8, 2, 80, 16, (40, 15)),
    Case("page boundaries", 4, 1, 64, 64, (63, 64, 65)),
    Case("window", 6, 2, 64, 16, (90, 20, 1, 0), window=21),
    Case("window of one", 4, 2, 64, 16, (50, 64), window=1),
    Case("wide table", 3, 1, 64, 16, (20, 3), width=96),
    Case("all empty", 4, 2, 64, 16, (0, 0)),
)

LARGE = (
    Case("llama-8b B=64 ctx 1024", 32, 8, 128, 64, (1024,) * 64, width=128),
    Case("llama-8b ragged", 32, 8, 128, 64, tuple(1 + 53 * i % 2000 for i in range(33)), width=128),
    Case("llama-8b B=1 long", 32, 8, 128, 64, (7777,), width=2048),
    Case("llama-8b window", 32, 8, 128, 64, (3000, 50, 4096, 1024), window=1000, width=128),
    Case("qwen-0.5b B=64", 14, 2, 64, 64, tuple(1 + 17 * i for i in range(64)), width=128),
    Case("smollm page 16", 9, 3, 64, 16, (500, 1000, 33, 0), width=128),
)
"""Only on a device: interpreting them would take minutes."""
