"""Paged prefill attention in plain XLA: the CPU engine's path, and the fallback everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

NEG = -1e30


def paged_prefill(
    q, k_pages, v_pages, page_table, q_starts, q_lens, prefix_lens,
    *, scale, window=None, tile=64, block=128,
):  # fmt: skip
    T, N, H = q.shape
    _, S, K, _ = k_pages.shape
    G = N // K
    c = max(1, block // S)
    bs = c * S
    W = -(-page_table.shape[1] // c) * c
    page_table = jnp.pad(page_table, ((0, 0), (0, W - page_table.shape[1])))
    tiles = (q_lens + tile - 1) // tile
    ends = jnp.cumsum(tiles)
    qp = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))

    def one(t, out):
        b = jnp.searchsorted(ends, t, side="right")
        start = (t - (ends[b] - tiles[b])) * tile
        row = q_starts[b] + start
        first_pos = prefix_lens[b] + start
        end = prefix_lens[b] + jnp.minimum(start + tile, q_lens[b])
        qt = lax.dynamic_slice_in_dim(qp, row, tile, 0).astype(jnp.float32) * scale
        qt = qt.reshape(tile, K, G, H).transpose(1, 2, 0, 3).reshape(K, G * tile, H)
        pos = jnp.tile(first_pos + jnp.arange(tile), G)[:, None]

        def body(i, carry):
            m, d, acc = carry
            pages = lax.dynamic_slice(page_table, (b, i * c), (1, c))[0]
            at = i * bs + jnp.arange(bs)
            k = k_pages[pages].reshape(bs, K, H).astype(jnp.float32)
            v = v_pages[pages].reshape(bs, K, H).astype(jnp.float32)
            v = jnp.where((at < end)[:, None, None], v, 0)
            s = jnp.einsum("kmh,tkh->kmt", qt, k, precision="highest")
            ok = (at <= pos) & (at < end)
            if window:
                ok &= at > pos - window
            s = jnp.where(ok, s, NEG)
            mn = jnp.maximum(m, s.max(-1, keepdims=True))
            p = jnp.where(ok, jnp.exp(s - mn), 0)
            a = jnp.exp(m - mn)
            d = d * a + p.sum(-1, keepdims=True)
            acc = acc * a + jnp.einsum("kmt,tkh->kmh", p, v, precision="highest")
            return mn, d, acc

        init = (
            jnp.full((K, G * tile, 1), NEG, jnp.float32),
            jnp.zeros((K, G * tile, 1), jnp.float32),
            jnp.zeros((K, G * tile, H), jnp.float32),
        )
        lo = jnp.maximum(first_pos - window + 1, 0) // bs if window else 0
        _, d, acc = lax.fori_loop(lo, (end + bs - 1) // bs, body, init)
        o = (acc / jnp.maximum(d, 1e-30)).reshape(K, G, tile, H).transpose(2, 0, 1, 3)
        return lax.dynamic_update_slice_in_dim(out, o.reshape(tile, N, H).astype(q.dtype), row, 0)

    out = lax.fori_loop(0, ends[-1], one, jnp.zeros_like(qp))
    return out[:T]
