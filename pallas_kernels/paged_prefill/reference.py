"""The plain meaning of paged_prefill, for tests: NumPy float32, one sequence at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.paged_decode.reference import attend


def paged_prefill(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    q_starts: Any,
    q_lens: Any,
    prefix_lens: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    reach: Any = None,
) -> np.ndarray:
    """See pallas_kernels.paged_prefill. Returns float32 [T, N, H], zeros in rows of no sequence."""
    q, k_pages, v_pages = (np.asarray(x) for x in (q, k_pages, v_pages))
    page_table = np.asarray(page_table)
    page_size, _, head_dim = k_pages.shape[1:]
    out = np.zeros(q.shape, np.float32)
    lens = (np.asarray(x) for x in (q_starts, q_lens, prefix_lens))
    for row, (start, count, prefix) in enumerate(zip(*lens, strict=True)):
        if not count:
            continue
        at = np.arange(prefix + count)
        where = page_table[row, at // page_size], at % page_size
        k, v = k_pages[where].astype(np.float32), v_pages[where].astype(np.float32)
        query_at = (prefix + np.arange(count))[:, None]
        rows = slice(start, start + count)
        seen = at <= (query_at if reach is None else np.asarray(reach)[rows, None])
        if window:
            seen &= at > query_at - window
        by = head_dim**-0.5 if scale is None else scale
        out[rows] = attend(q[rows].astype(np.float32), k, v, seen, by, soft_cap)
    return out
