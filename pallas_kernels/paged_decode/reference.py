"""The plain meaning of paged_decode, for tests: NumPy float32, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: Any, scale: float, soft_cap: float | None
) -> np.ndarray:
    """q [t, N, H] over k, v [c, K, H], where seen [t, c] -> [t, N, H], all float32."""
    tokens, _, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(tokens, kv_heads, -1, head_dim).transpose(1, 2, 0, 3)  # [K, G, t, H]
    scores = grouped @ k.transpose(1, 2, 0)[:, None] * np.float32(scale)  # [K, G, t, c]
    if soft_cap is not None:
        scores = np.float32(soft_cap) * np.tanh(scores / np.float32(soft_cap))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v.transpose(1, 0, 2)[:, None]
    return out.transpose(2, 0, 1, 3).reshape(q.shape)


def paged_decode(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> np.ndarray:
    """See pallas_kernels.paged_decode. Returns float32 [B, N, H]."""
    q, k_pages, v_pages = (np.asarray(x) for x in (q, k_pages, v_pages))
    page_table, lengths = np.asarray(page_table), np.asarray(lengths)
    page_size, _, head_dim = k_pages.shape[1:]
    out = np.zeros(q.shape, np.float32)
    for row, length in enumerate(lengths):
        at = np.arange(max(0, length - window) if window else 0, length)
        if not at.size:
            continue
        where = page_table[row, at // page_size], at % page_size
        k, v = k_pages[where].astype(np.float32), v_pages[where].astype(np.float32)
        query = q[row][None].astype(np.float32)
        by = head_dim**-0.5 if scale is None else scale
        out[row] = attend(query, k, v, True, by, soft_cap)[0]
    return out
