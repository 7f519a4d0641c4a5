"""Paged prefill attention, Pallas on the Triton backend.

Grid (K, tiles). A tile is `rows` rows of (query tokens x group) of one KV head and one sequence, so
a block of K and V is read once for the G query heads that share it:

    row r of a tile   ->  token r // G of the tile, query head r % G     (rows % G rows stay empty)

    keys of the sequence   0 ............ first query ........ last query of the tile
                           |--block--|--block--|--block--|--block--|
    all rows see all of it |<-- no mask ------>|
    causal (or window) edge                    |<---- masked ----->|   (reach: to the farthest)

    per block: page_table -> page ids -> K [block, H] -> scores [rows, block] -> softmax, online
               page ids -> V [block, H]  -> acc [rows, H] float32 (registers)

q is loaded once a tile, the output stored once; scores never leave the registers. plan.py says
which sequence and offset a tile has; unused tiles exit at once. With a window, masked blocks come
on both sides, and blocks below it are skipped.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_features import paged_features
from pallas_kernels.paged_prefill.plan import FIXED_TILE, plan_tiles
from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.triton_ops import (
    base2_scores,
    ceil_div,
    check_pages,
    column,
    dot,
    headroom,
    load_tokens,
    plt,
    row,
    scaled_queries,
)
from pallas_kernels.tuning import tuned

MAX_INT32 = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: of a tile, tokens x group; block: keys a step; both powers of two. 128 x 64 is at the
    register limit: it spills with 4 warps in some compilers, measured fastest on an H100."""

    rows: int = 128
    block: int = 64
    num_warps: int = 8
    num_stages: int = 3


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any. Of head dim 256, 128 x 64 spills 6.5 kB
    with 4 warps and 0.8 kB with 8, 64 x 32 nothing (Triton 3.6, ptxas for sm_90a)."""
    if features["itemsize"] == 4:  # true float32 products do without tensor cores
        base = Sizes(rows=64, block=32, num_warps=4, num_stages=2)
    elif features["head_dim"] > 128:
        base = Sizes(rows=64, block=32)
    else:
        base = Sizes()
    return dataclasses.replace(base, **tuned(device, "paged_prefill", "triton", features))


def _kernel(
    q_ref, k_ref, v_ref, table_ref, start_ref, len_ref, prefix_ref, first_page_ref,
    sequence_ref, offset_ref, *refs, group, rows, tokens_a_tile, width, block, scale, window,
    soft_cap,
):  # fmt: skip
    *reach_ref, out_ref = refs
    head, number = pl.program_id(0), pl.program_id(1)
    head_dim = q_ref.shape[-1]
    sequence = sequence_ref[number]

    @pl.when(sequence >= 0)
    def _():
        offset, first_page = offset_ref[number], first_page_ref[0]
        start, count, prefix = start_ref[sequence], len_ref[sequence], prefix_ref[sequence]
        r = jnp.arange(rows, dtype=jnp.int32)
        token = lax.div(r, jnp.full_like(r, group))
        local = offset + token
        mine = (token < tokens_a_tile) & (local < count)
        columns = row(jnp.arange(width, dtype=jnp.int32), rows)
        mask = column(mine, width) & (columns < head_dim)
        at = (
            column(start + local, width),
            column(head * group + r - token * group, width),
            columns,
        )
        q = plt.load(q_ref.at[at], mask=mask, other=0.0)
        q, factor = scaled_queries(q, k_ref, scale)
        room = headroom(q.dtype)
        at_query = limit = prefix + local  # limit: the last key that each row sees

        first_query = prefix + offset
        end = prefix + jnp.minimum(offset + tokens_a_tile, count)  # one past the last query
        nearest, farthest = first_query, end
        if reach_ref:
            limit = plt.load(reach_ref[0].at[start + local], mask=mine, other=0)
            nearest = jnp.min(jnp.where(mine, limit, MAX_INT32))
            farthest = jnp.max(limit) + 1
        last_block = ceil_div(farthest, block)
        free_end = lax.div(nearest + 1, jnp.int32(block))  # blocks below: seen by all rows
        if window:
            first_block = lax.div(jnp.maximum(first_query - window + 1, 0), jnp.int32(block))
            free_begin = ceil_div(jnp.maximum(end - window, 0), block)
            free_begin = jnp.clip(free_begin, first_block, free_end)
        else:
            first_block = free_begin = jnp.int32(0)

        def step(i, carry, *, masked):
            top, total, acc = carry
            tokens = i * block + jnp.arange(block, dtype=jnp.int32)
            live = tokens < farthest if masked else None
            if masked and window:
                live &= tokens > first_query - window
            k = load_tokens(
                k_ref, table_ref, first_page, sequence, head, tokens, live, width, q.dtype
            )
            scores = base2_scores(dot(q, k, 1), factor, soft_cap)
            if masked:
                key, query = row(tokens, rows), column(at_query, block)
                seen = key <= (column(limit, block) if reach_ref else query)
                if window:
                    seen &= key > query - window
                scores = jnp.where(seen, scores, NEG)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) - room)
            # a row that saw nothing yet counts 1 a key here; its first real score shrinks that to 0
            weights = jnp.exp2(scores - new_top[:, None])
            shrink = jnp.exp2(top - new_top)
            v = load_tokens(
                v_ref, table_ref, first_page, sequence, head, tokens, live, width, q.dtype
            )
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * shrink[:, None] + dot(weights.astype(v.dtype), v, 0)
            return new_top, total, acc

        carry = (
            jnp.full((rows,), NEG, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, width), jnp.float32),
        )
        masked, free = functools.partial(step, masked=True), functools.partial(step, masked=False)
        if window:
            carry = lax.fori_loop(first_block, free_begin, masked, carry)
        carry = lax.fori_loop(free_begin, free_end, free, carry)
        _, total, acc = lax.fori_loop(free_end, last_block, masked, carry)
        out = acc / jnp.maximum(total, TINY)[:, None]
        plt.store(out_ref.at[at], out.astype(out_ref.dtype), mask=mask)


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
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See pallas_kernels.paged_prefill. interpret: run on any backend, slowly."""
    tokens, heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    if head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim} is above 256")
    check_pages(k_pages)
    if sizes is None:
        features = {"tokens": tokens, **paged_features(q, k_pages)}
        sizes = default_sizes(current_device(), features)
    if group > sizes.rows:
        raise NotImplementedError(f"{group} query heads a KV head do not fit {sizes.rows} rows")
    if first_page is None:
        first_page = jnp.zeros(1, jnp.int32)
    tokens_a_tile = sizes.rows // group
    if fixed_tiles:
        tokens_a_tile = min(1 << (tokens_a_tile.bit_length() - 1), FIXED_TILE)
    sequence, offset = plan_tiles(q_lens, tokens, tokens_a_tile)
    arrays = (q, k_pages, v_pages, page_table, q_starts, q_lens, prefix_lens, first_page)
    reaches = () if reach is None else (reach,)
    return triton_call(
        functools.partial(
            _kernel,
            group=group,
            rows=sizes.rows,
            tokens_a_tile=tokens_a_tile,
            width=pl.next_power_of_2(head_dim),
            block=sizes.block,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        ),
        name="paged_prefill",
        grid=(kv_heads, sequence.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
    )(*arrays, sequence, offset, *reaches)
