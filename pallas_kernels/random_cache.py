"""Random paged caches for tests and benchmarks: shuffled pages, and poison where nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def random_cache(
    rng: np.random.Generator,
    lengths: Sequence[int],
    *,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    width: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(k_pages, v_pages, page_table) for rows that hold `lengths` tokens.

    Pages are dealt at random, no two rows share one, three belong to nobody. Slots that hold no
    token are NaN, page_table entries past a row's length are arbitrary pages: what a kernel must
    not be disturbed by. width: of the page table, by default one column more than needed.
    """
    counts = [-(-int(length) // page_size) for length in lengths]
    width = max([*counts, 0]) + 1 if width is None else width
    total = sum(counts) + 3
    order = rng.permutation(total).astype(np.int32)
    table = rng.integers(0, total, (len(counts), width), dtype=np.int32)
    shape = (total, page_size, kv_heads, head_dim)
    pools = [np.full(shape, np.nan, np.float32) for _ in range(2)]
    used = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine = order[used : used + count]
        used += count
        table[row, :count] = mine
        at = np.arange(int(length))
        for pool in pools:
            values = rng.standard_normal((at.size, kv_heads, head_dim), dtype=np.float32)
            pool[mine[at // page_size], at % page_size] = values
    return pools[0].astype(dtype), pools[1].astype(dtype), table
