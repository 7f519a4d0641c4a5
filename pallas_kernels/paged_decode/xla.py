"""Paged decode attention in plain XLA: the CPU engine's path, and the fallback everywhere.

One program for all lengths. A loop with a traced bound walks blocks of pages, all rows together,
up to the longest row:

    block i of every row:  pages [B, n] --gather--> K, V [B, n*S, K, H] --> online softmax

Memory a step is one block of K and V, whatever the table's width. Blocks of 32 tokens: for 30
layers of SmolLM2-135M at B=16, 7.3 / 28 ms at ctx 20 / 256, against 15.9 / 33 with 128 and 8.9 / 41
with 16 (2 idle cores, jax 0.10.2); at B=1 it makes no difference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.xla_blocks import cap, dot, pad_table, pages_per_block, read_block

# Up to this many KV heads the scores of all heads are one product with a block-diagonal q:
# [N, K*H] x [K*H, tokens] computes K times too much, and is still faster on a CPU, where a batch of
# products with G rows each runs at a fraction of the speed (36 against 55 ms for 30 layers of
# SmolLM2-135M at B=16, ctx 256, interleaved on two busy cores). The einsum has three dimensions for
# the same reason: with a head axis of one that product took 50 ms.
MAX_DIAGONAL_HEADS = 4


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    locks: jax.Array | None = None,
    first_page: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    block: int = 32,
) -> Any:
    """See pallas_kernels.paged_decode. block: tokens a loop step, rounded to whole pages."""
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    pages = pages_per_block(page_size, block)
    block = pages * page_size
    page_table = pad_table(page_table, pages)
    if first_page is not None:
        page_table = page_table + first_page
    first = jnp.maximum(lengths - window, 0) if window else jnp.zeros_like(lengths)
    nowhere = page_table.shape[1] * page_size
    begin = jnp.min(jnp.where(lengths > 0, first, nowhere)) // block
    end = jnp.max((lengths + (block - 1)) // block)

    diagonal = kv_heads <= MAX_DIAGONAL_HEADS
    q32 = q.astype(jnp.float32) * scale
    if diagonal:  # one head of width K*H, of which each query sees its own H
        own = jnp.repeat(jnp.eye(kv_heads, dtype=jnp.float32), heads // kv_heads, axis=0)
        queries = (q32[:, :, None, :] * own[None, :, :, None]).reshape(rows, heads, -1)
        score, gather = "bnh,bth->bnt", "bnt,bth->bnh"
    else:
        queries = q32.reshape(rows, kv_heads, heads // kv_heads, head_dim)
        score, gather = "bkgh,btkh->bkgt", "bkgt,btkh->bkgh"
    between = queries.ndim - 2  # axes between B and the last: heads

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        table = lax.dynamic_slice_in_dim(page_table, i * pages, pages, axis=1)
        at = i * block + jnp.arange(block, dtype=jnp.int32)
        live = (at < lengths[:, None]) & (at >= first[:, None])  # [B, block]
        shape = (rows, block, -1) if diagonal else (rows, block, kv_heads, head_dim)
        k = read_block(k_pages, table).reshape(shape)
        v = read_block(v_pages, table).reshape(shape)
        # slots that were never written may hold NaN, and 0 * NaN is NaN
        v = jnp.where(live.reshape(rows, block, *[1] * (v.ndim - 2)), v, 0.0)
        scores = cap(dot(score, queries, k), soft_cap)
        scores = jnp.where(live.reshape(rows, *[1] * between, block), scores, NEG)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        # a row without a live token so far weighs 1 a token here, of values that are 0; its first
        # live token shrinks the sum of those weights to 0
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1, keepdims=True)
        acc = acc * shrink + dot(gather, weights, v)
        return new_top, total, acc

    like = (*queries.shape[:-1], 1)
    start = (
        jnp.full(like, NEG, jnp.float32),
        jnp.zeros(like, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    _, total, acc = lax.fori_loop(begin, end, step, start)
    out = acc / jnp.maximum(total, TINY)
    if diagonal:
        out = out.reshape(rows, heads, kv_heads, head_dim)
        out = (out * own[None, :, :, None]).sum(2)
    out = out.reshape(q.shape).astype(q.dtype)
    return out if locks is None else (out, locks)
