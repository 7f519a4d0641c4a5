"""Named shapes for paged_decode: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.random_cache import random_cache


@dataclasses.dataclass(frozen=True)
class Case:
    """heads N, kv_heads K, head_dim H, page_size S, lengths [B]; width: page-table columns, None
    for one more than the longest row needs; fp8: pages of float8_e4m3fn."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    lengths: tuple[int, ...]
    window: int | None = None
    width: int | None = None
    soft_cap: float | None = None
    fp8: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"window": self.window, "soft_cap": self.soft_cap}

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(q, k_pages, v_pages, page_table, lengths), random, unwritten slots NaN."""
        rng = np.random.default_rng(seed)
        cache = random_cache(
            rng, self.lengths, page_size=self.page_size, kv_heads=self.kv_heads,
            head_dim=self.head_dim, width=self.width,
            dtype=jnp.float8_e4m3fn if self.fp8 else dtype,
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
    Case("soft cap", 4, 2, 64, 16, (40, 3), soft_cap=1.5),
    Case("soft cap window", 7, 1, 64, 16, (90, 0, 20), window=32, soft_cap=2.0),
    Case("fp8", 8, 2, 64, 16, (70, 0, 33), fp8=True),
    Case("fp8 head dim 80", 4, 2, 80, 16, (40, 15), soft_cap=5.0, fp8=True),
)

LARGE = (
    Case("llama-8b B=64 ctx 1024", 32, 8, 128, 64, (1024,) * 64, width=128),
    Case("llama-8b ragged", 32, 8, 128, 64, tuple(1 + 53 * i % 2000 for i in range(33)), width=128),
    Case("llama-8b B=1 long", 32, 8, 128, 64, (7777,), width=2048),
    Case("llama-8b window", 32, 8, 128, 64, (3000, 50, 4096, 1024), window=1000, width=128),
    Case("qwen-0.5b B=64", 14, 2, 64, 64, tuple(1 + 17 * i for i in range(64)), width=128),
    Case("smollm page 16", 9, 3, 64, 16, (500, 1000, 33, 0), width=128),
    Case("gemma-2", 16, 8, 256, 64, (3000, 77, 1), window=1024, width=128, soft_cap=50.0),
    Case("llama-8b fp8 ragged", 32, 8, 128, 64, (1, 700, 0, 2049, 64), width=128, fp8=True),
    Case("qwen-0.5b B=256", 14, 2, 64, 64, tuple(300 + i for i in range(256)), width=128),
)
"""Only on a device: interpreting them would take minutes."""
