"""The plain meaning of paged_decode, for tests: NumPy float32, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def paged_decode(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> np.ndarray:
    """See pallas_kernels.paged_decode. Returns float32 [B, N, H]."""
    q, k_pages, v_pages = (np.asarray(x).astype(np.float32) for x in (q, k_pages, v_pages))
    page_table, lengths = np.asarray(page_table), np.asarray(lengths)
    page_size, heads, head_dim = k_pages.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros(q.shape, np.float32)
    for row, length in enumerate(lengths):
        first = max(0, length - window) if window else 0
        at = np.arange(first, length)
        if not at.size:
            continue
        where = page_table[row, at // page_size], at % page_size
        k, v = k_pages[where], v_pages[where]  # [tokens, K, H]
        grouped = q[row].reshape(heads, -1, head_dim)
        scores = np.einsum("kgh,tkh->kgt", grouped, k) * scale
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out[row] = np.einsum("kgt,tkh->kgh", scores, v).reshape(-1, head_dim)
    return out
