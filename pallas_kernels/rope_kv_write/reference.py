"""The plain meaning of rope_kv_write, for tests: NumPy float32, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.rope_kv_write.pages import FP8


def _norm(x: np.ndarray, scale: Any, eps: float, dtype: Any) -> np.ndarray:
    """RMSNorm of x [heads, H] float32, rounded to dtype."""
    if scale is None:
        return x
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return (x * np.asarray(scale).astype(np.float32)).astype(dtype).astype(np.float32)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [heads, H] by the angles [H/2] of its token."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _to_pages(x: np.ndarray, dtype: Any) -> np.ndarray:
    return (np.clip(x, -448, 448) if dtype == FP8 else x).astype(dtype)


def rope_kv_write(
    qkv: Any,
    cos: Any,
    sin: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    first_page: Any,
    q_norm: Any = None,
    k_norm: Any = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See pallas_kernels.rope_kv_write."""
    qkv, cos, sin = (np.asarray(x) for x in (qkv, cos, sin))
    new_k, new_v = np.array(k_pages), np.array(v_pages)
    pages, page_size, kv_heads, head_dim = new_k.shape
    group = num_heads // kv_heads
    heads = qkv.reshape(qkv.shape[0], kv_heads, group + 2, head_dim).astype(np.float32)
    q_out = np.zeros((qkv.shape[0], num_heads, head_dim), qkv.dtype)
    for token, slot in enumerate(np.asarray(slots) + first_page[0] * page_size):
        k, v = heads[token, :, group], heads[token, :, group + 1]
        q = _norm(heads[token, :, :group].reshape(-1, head_dim), q_norm, eps, qkv.dtype)
        k = _norm(k, k_norm, eps, qkv.dtype)
        q_out[token] = _rotate(q, cos[token], sin[token]).astype(qkv.dtype)
        if slot < pages * page_size:
            at = slot // page_size, slot % page_size
            new_k[at] = _to_pages(_rotate(k, cos[token], sin[token]), new_k.dtype)
            new_v[at] = _to_pages(v, new_v.dtype)
    return q_out, new_k, new_v
