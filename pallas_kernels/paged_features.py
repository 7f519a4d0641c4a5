"""What tuned sizes of attention over pages may depend on."""

from __future__ import annotations

from typing import Any


def paged_features(q: Any, k_pages: Any) -> dict[str, int]:
    """q [T or B, N, H], k_pages [P, S, K, H]: arrays, or their shapes and dtypes. What the first
    axis of q counts is up to the operation, which adds it by its own name."""
    _, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    return {
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "itemsize": q.dtype.itemsize,
        "kv_itemsize": k_pages.dtype.itemsize,
    }
