"""Paged decode attention in plain XLA: the CPU engine's path, and the fallback everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

NEG = -1e30


def paged_decode(q, k_pages, v_pages, page_table, lengths, *, scale, window=None, block=128):
    B, N, H = q.shape
    _, S, K, _ = k_pages.shape
    c = max(1, block // S)
    W = -(-page_table.shape[1] // c) * c
    page_table = jnp.pad(page_table, ((0, 0), (0, W - page_table.shape[1])))
    bs = c * S
    qg = q.astype(jnp.float32).reshape(B, K, N // K, H) * scale
    lo = jnp.maximum(lengths - window, 0) if window else jnp.zeros_like(lengths)
    first = jnp.min(jnp.where(lengths > 0, lo, W * S)) // bs
    last = jnp.max((lengths + bs - 1) // bs)

    def body(i, carry):
        m, d, acc = carry
        pages = lax.dynamic_slice_in_dim(page_table, i * c, c, 1)
        at = i * bs + jnp.arange(bs)
        ok = (at < lengths[:, None]) & (at >= lo[:, None])
        k = k_pages[pages].reshape(B, bs, K, H).astype(jnp.float32)
        v = v_pages[pages].reshape(B, bs, K, H).astype(jnp.float32)
        v = jnp.where(ok[:, :, None, None], v, 0)
        s = jnp.einsum("bkgh,btkh->bkgt", qg, k, precision="highest")
        s = jnp.where(ok[:, None, None], s, NEG)
        mn = jnp.maximum(m, s.max(-1, keepdims=True))
        p = jnp.where(ok[:, None, None], jnp.exp(s - mn), 0)
        a = jnp.exp(m - mn)
        d = d * a + p.sum(-1, keepdims=True)
        acc = acc * a + jnp.einsum("bkgt,btkh->bkgh", p, v, precision="highest")
        return mn, d, acc

    init = (
        jnp.full((B, K, N // K, 1), NEG, jnp.float32),
        jnp.zeros((B, K, N // K, 1), jnp.float32),
        jnp.zeros((B, K, N // K, H), jnp.float32),
    )
    _, d, acc = lax.fori_loop(first, last, body, init)
    return (acc / jnp.maximum(d, 1e-30)).reshape(B, N, H).astype(q.dtype)
