"""Paged prefill attention in plain XLA: the CPU engine's path, and the fallback everywhere.

One program for all lengths. The outer loop walks the live query tiles (a tile is `tile` rows of one
sequence), the inner loop walks that tile's blocks of keys up to the last that it sees:

    for tile in live tiles:   q [tile, N, H] -> [K, G*tile, H]
        for block of pages:   K, V [block, K, H] -> online softmax
        out[tile rows] = ...

A tile may reach past its sequence's end: its rows there are unspecified, and the tiles of the next
sequence, which come later, write over them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_prefill.plan import FIXED_TILE
from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.xla_blocks import cap, dot, pad_table, pages_per_block, read_block


def paged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    q_lens: jax.Array,
    prefix_lens: jax.Array,
    first_page: jax.Array | None = None,
    reach: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    fixed_tiles: bool = False,
    tile: int = 64,
    block: int = 64,
) -> jax.Array:
    """See pallas_kernels.paged_prefill. tile: query rows, block: tokens an inner step, rounded to
    whole pages."""
    if fixed_tiles and FIXED_TILE % tile:
        raise NotImplementedError(f"tiles of {tile} tokens do not divide {FIXED_TILE}")
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    pages = pages_per_block(page_size, block)
    block = pages * page_size
    page_table = pad_table(page_table, pages)
    if first_page is not None:
        page_table = page_table + first_page
    tiles = (q_lens + (tile - 1)) // tile
    ends = jnp.cumsum(tiles)
    # a slice at the last rows would be clamped, that is moved: room for one tile more
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    limits = None if reach is None else jnp.pad(reach, (0, tile))

    def one_tile(number: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(ends, number, side="right", method="compare_all")
        row = row.astype(jnp.int32)
        offset = (number - (ends[row] - tiles[row])) * tile
        begin = q_starts[row] + offset
        position = prefix_lens[row] + offset  # of the tile's first query
        end = prefix_lens[row] + jnp.minimum(offset + tile, q_lens[row])  # one past the last key
        queries = lax.dynamic_slice_in_dim(padded, begin, tile).astype(jnp.float32) * scale
        queries = queries.reshape(tile, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        queries = queries.reshape(kv_heads, group * tile, head_dim)
        at_query = jnp.tile(position + jnp.arange(tile, dtype=jnp.int32), group)[:, None]
        limit = at_query  # the last key that each query sees
        if limits is not None:
            of_tokens = lax.dynamic_slice_in_dim(limits, begin, tile)
            mine = offset + jnp.arange(tile, dtype=jnp.int32) < q_lens[row]
            end = jnp.max(jnp.where(mine, of_tokens, 0)) + 1
            limit = jnp.tile(of_tokens, group)[:, None]

        def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            table = lax.dynamic_slice(page_table, (row, i * pages), (1, pages))[0]
            at = i * block + jnp.arange(block, dtype=jnp.int32)
            written = at < end
            live = (at <= limit) & written  # [G*tile, block]
            if window:
                live &= at > at_query - window
                written &= at > position - window
            k = read_block(k_pages, table)
            # slots that were never written may hold NaN, and 0 * NaN is NaN
            v = jnp.where(written[:, None, None], read_block(v_pages, table), 0.0)
            scores = cap(dot("kmh,tkh->kmt", queries, k), soft_cap)
            scores = jnp.where(live, scores, NEG)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            # a query without a live key so far weighs 1 a key here; its first live key, at the
            # latest itself, shrinks that to 0
            weights = jnp.exp(scores - new_top)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(-1, keepdims=True)
            acc = acc * shrink + dot("kmt,tkh->kmh", weights, v)
            return new_top, total, acc

        like = (kv_heads, group * tile, 1)
        start = (
            jnp.full(like, NEG, jnp.float32),
            jnp.zeros(like, jnp.float32),
            jnp.zeros(queries.shape, jnp.float32),
        )
        first = jnp.maximum(position - window + 1, 0) // block if window else 0
        last = (end + (block - 1)) // block
        _, total, acc = lax.fori_loop(first, last, step, start)
        result = (acc / jnp.maximum(total, TINY)).reshape(kv_heads, group, tile, head_dim)
        result = result.transpose(2, 0, 1, 3).reshape(tile, heads, head_dim)
        return lax.dynamic_update_slice_in_dim(out, result.astype(q.dtype), begin, 0)

    return lax.fori_loop(0, ends[-1], one_tile, jnp.zeros_like(padded))[:tokens]
