"""Named shapes for paged_prefill: real models, and the edges where kernels break."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.random_cache import random_cache


@dataclasses.dataclass(frozen=True)
class Case:
    """heads N, kv_heads K, head_dim H, page_size S; q_lens, prefix_lens [B]; tail: rows of padding
    after the last sequence, a multiple of 8; width: page-table columns, None for just enough;
    fp8: pages of float8_e4m3fn; blocks: (sequence, first of its new tokens, tokens) of each block
    that sees all of itself, None for a call without reach."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    q_lens: tuple[int, ...]
    prefix_lens: tuple[int, ...]
    window: int | None = None
    tail: int = 0
    width: int | None = None
    soft_cap: float | None = None
    fp8: bool = False
    blocks: tuple[tuple[int, int, int], ...] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"window": self.window, "soft_cap": self.soft_cap}

    def starts(self) -> np.ndarray:
        """[B + 1]: each sequence's first packed row, a multiple of 8; then the tail."""
        padded = [-(-count // 8) * 8 for count in self.q_lens]
        return np.cumsum([0, *padded], dtype=np.int32)

    def inputs(self, seed: int, dtype: Any) -> tuple[np.ndarray, ...]:
        """(q, k_pages, v_pages, page_table, q_starts, q_lens, prefix_lens), random; unwritten slots
        and rows of q between the sequences are NaN."""
        rng = np.random.default_rng(seed)
        lengths = [a + b for a, b in zip(self.q_lens, self.prefix_lens, strict=True)]
        cache = random_cache(
            rng, lengths, page_size=self.page_size, kv_heads=self.kv_heads,
            head_dim=self.head_dim, width=self.width,
            dtype=jnp.float8_e4m3fn if self.fp8 else dtype,
        )  # fmt: skip
        starts = self.starts()
        q = np.full((int(starts[-1]) + self.tail, self.heads, self.head_dim), np.nan, np.float32)
        live = self.live()
        q[live] = rng.standard_normal((live.size, self.heads, self.head_dim), dtype=np.float32)
        lens = (np.asarray(x, np.int32) for x in (self.q_lens, self.prefix_lens))
        return (q.astype(dtype), *cache, starts[:-1], *lens)

    def reach(self) -> np.ndarray | None:
        """[T] int32; rows of no sequence hold any number."""
        if self.blocks is None:
            return None
        starts = self.starts()
        out = np.full(int(starts[-1]) + self.tail, np.iinfo(np.int32).max, np.int32)
        out[1::2] = -1
        for start, count, prefix in zip(starts[:-1], self.q_lens, self.prefix_lens, strict=True):
            out[start : start + count] = prefix + np.arange(count)
        for sequence, first, count in self.blocks:
            assert first + count <= self.q_lens[sequence]
            row = starts[sequence] + first
            out[row : row + count] = self.prefix_lens[sequence] + first + count - 1
        return out

    def live(self) -> np.ndarray:
        """Packed rows that belong to a sequence."""
        pairs = zip(self.starts()[:-1], self.q_lens, strict=True)
        return np.concatenate([np.arange(start, start + count) for start, count in pairs])


MANY = ((0, 0, 20), (0, 20, 7), (0, 60, 10), (2, 0, 9), (3, 11, 64))
"""Blocks at a start, side by side, at an end, a whole prompt, and behind a prefix."""
WIDE = ((0, 9, 60), (1, 0, 40), (2, 3, 2))
"""The first two are wider than the case's window."""

EDGES = (
    Case("llama-8b", 32, 8, 128, 64, (20,), (50,)),
    Case("qwen-0.5b", 14, 2, 64, 64, (9, 24), (0, 70)),
    Case("smollm mixed", 9, 3, 64, 16, (5, 0, 40, 1), (0, 30, 17, 64), tail=16),
    Case("one head a group", 4, 4, 64, 16, (33,), (0,)),
    Case("group of 8", 8, 1, 128, 16, (17,), (16,)),
    Case("head dim 80", 8, 2, 80, 16, (12, 8), (0, 33)),
    Case("head dim 96", 4, 4, 96, 16, (33, 0, 7), (20, 3, 0)),
    Case("head dim 256", 2, 1, 256, 16, (70, 9), (30, 0), 40, soft_cap=5.0, blocks=((0, 3, 60),)),
    Case("page boundaries", 4, 1, 64, 64, (63, 64, 65), (1, 0, 63)),
    Case("two warpgroups", 2, 1, 64, 16, (130, 70), (0, 5), tail=8),
    Case("window", 6, 2, 64, 16, (40, 3, 70), (50, 0, 0), window=21),
    Case("window of one", 4, 2, 64, 16, (30,), (9,), window=1),
    Case("causal edges", 2, 1, 64, 16, (9, 3, 4, 1, 5), (30, 31, 62, 63, 61)),
    Case("window edges", 2, 1, 64, 16, (33, 5, 40, 3, 3), (31, 64, 15, 62, 94), window=32),
    Case("nothing to do", 4, 2, 64, 16, (0, 0), (5, 0), tail=16),
    Case(
        "many short", 8, 2, 64, 16, (1, 9, 0, 17, 3, 40, 8, 1), (70, 0, 0, 5, 129, 8, 0, 0), tail=8
    ),
    Case("soft cap", 4, 2, 64, 16, (30, 7), (9, 60), soft_cap=1.5),
    Case("soft cap window", 6, 1, 64, 16, (70,), (90,), window=40, soft_cap=2.0),
    Case("fp8", 8, 2, 64, 16, (33, 5), (20, 0), fp8=True),
    Case("blocks", 4, 2, 64, 16, (70, 0, 9, 90, 1), (0, 5, 0, 33, 17), tail=16, blocks=MANY),
    Case("blocks window", 6, 1, 64, 16, (80, 40, 5), (50, 0, 30), window=21, blocks=WIDE),
    Case("blocks cap", 8, 1, 128, 16, (150,), (16,), 140, soft_cap=2.0, blocks=((0, 2, 140),)),
    Case("blocks fp8", 8, 2, 64, 16, (33, 5), (20, 0), fp8=True, blocks=((0, 1, 30),)),
)

LARGE = (
    Case("llama-8b 4 x 512 + prefixes", 32, 8, 128, 64, (512,) * 4, (0, 512, 100, 1500), width=128),
    Case("llama-8b 1 x 2048", 32, 8, 128, 64, (2048,), (0,), width=128),
    Case(
        "llama-8b ragged", 32, 8, 128, 64, (300, 1, 129, 64, 0, 517), (0, 333, 64, 1000, 9, 0),
        tail=64, width=128,
    ),
    Case("llama-8b window", 32, 8, 128, 64, (700, 33), (900, 2000), window=512, width=128),
    Case("qwen-0.5b", 14, 2, 64, 64, (513, 64, 1000), (77, 0, 1), width=128),
    Case("smollm page 16", 9, 3, 64, 16, (100, 250), (40, 0), width=128),
    Case("llama-8b 16 x 512", 32, 8, 128, 64, (512,) * 16, (0,) * 16, width=128),
    Case(
        "llama-8b mixed step", 32, 8, 128, 64, (1,) * 40 + (333, 70), (*range(900, 940), 0, 64),
        tail=32, width=128,
    ),
    Case("qwen-0.5b many", 14, 2, 64, 64, tuple(range(1, 200, 9)), tuple(range(23)), width=128),
    Case("group of 8", 64, 8, 128, 64, (300, 200), (0, 100), width=128),
    Case("gemma-2", 16, 8, 256, 64, (700, 50), (500, 0), window=512, width=128, soft_cap=50.0),
    Case("phi-3-mini", 32, 32, 96, 64, (300, 1, 77), (64, 900, 0), window=512, width=128),
    Case("gemma-2 page 16", 16, 8, 256, 16, (300, 9, 1000), (0, 70, 500), width=128),
    Case("llama cap", 32, 8, 128, 64, (400, 33), (100, 900), window=256, width=128, soft_cap=30.0),
    Case(
        "gemma-3 pictures", 8, 4, 256, 64, (700, 1, 300, 256), (500, 90, 0, 64), width=128,
        blocks=((0, 10, 256), (0, 266, 256), (2, 44, 256), (3, 0, 256)),
    ),
    Case(
        "gemma-3 pictures window", 8, 4, 256, 64, (700, 1, 1100), (1500, 90, 0), width=128,
        window=1024, blocks=((0, 10, 256), (0, 266, 256), (2, 844, 256)),
    ),
    Case(
        "llama pictures", 32, 8, 128, 64, (900, *(1,) * 9, 333, 256), (0, *range(800, 809), 70, 64),
        width=128, tail=32, blocks=((0, 0, 256), (0, 300, 576), (10, 76, 257), (11, 0, 256)),
    ),
    Case(
        "llama pictures window", 32, 8, 128, 64, (600, 300), (130, 0), width=128, window=100,
        blocks=((0, 33, 256), (0, 344, 256), (1, 0, 300)),
    ),
    Case(
        "qwen pictures", 14, 2, 64, 64, (513, 64, 1000), (77, 0, 1), width=128,
        blocks=((0, 257, 256), (1, 0, 64), (2, 1, 999)),
    ),
    Case("llama-8b fp8", 32, 8, 128, 64, (300, 100), (64, 900), width=128, fp8=True),
)  # fmt: skip
"""Only on a device: interpreting them would take minutes."""
