"""Paged decode attention, Pallas on the Triton backend: split-KV in two passes.

Grid (K, splits, B). One program holds one KV head of one row: its G query heads, padded to 16 rows
(the least a tensor-core product takes), stay in registers while the row's tokens stream by.

    row's tokens   |---tile---|---tile---|---tile---|---tile---|-last-|
    splits=2       |<----- split 0 ----->|<----- split 1 ----------->|      (its OWN tiles, halved)

    per tile:  page_table -> page ids -> K [block, H] --+
               q [16, H] (registers) -------------------+-> scores [16, block] -> softmax, online
               page ids -> V [block, H] ----------------+-> acc [16, H] float32 (registers)

    pass 1 writes   partial [B, splits, N, H] float32 and its log-sum-exp [B, N, splits]
    pass 2 grid (N, B) merges the splits that had work:   out [B, N, H]

The number of splits is static (from B, K and the device), while lengths are not: a split without
tiles exits before it loads anything, and pass 2 reads only the splits that wrote. With one split
pass 1 writes the output itself. Each K and V byte of live tokens is read once, and no others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_decode.splits import choose_splits
from pallas_kernels.softmax import LOG2E, NEG, TINY
from pallas_kernels.triton_ops import ceil_div, column, dot, load_tokens, plt, row
from pallas_kernels.tuning import tuned

MIN_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block: tokens a tile, a power of two. splits: programs that share a row, a power of two; 0
    chooses. The page ids feed the loads, which halves the pipeline: num_stages 3 prefetches one
    tile, 5 two."""

    block: int = 64
    splits: int = 0
    num_warps: int = 4
    num_stages: int = 3


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    base = Sizes() if features["itemsize"] == 2 else Sizes(block=32)
    return dataclasses.replace(base, **tuned(device, "paged_decode", "triton", features))


def _share(length: Any, *, window: int | None, block: int, splits: int) -> tuple[Any, Any, Any]:
    """(first tile, last tile, tiles a split) of a row. Only the first splits may have work."""
    lowest = jnp.maximum(length - window, 0) if window else jnp.int32(0)
    first = lax.div(lowest, jnp.int32(block))
    last = ceil_div(length, block)
    return first, last, ceil_div(last - first, splits)


def _attend_kernel(
    q_ref, k_ref, v_ref, table_ref, length_ref, out_ref, lse_ref=None,
    *, group, rows, width, block, splits, scale, window,
):  # fmt: skip
    head, split, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    head_dim = q_ref.shape[-1]
    length = length_ref[b]
    first, last, share = _share(length, window=window, block=block, splits=splits)
    begin = first + split * share
    end = jnp.minimum(begin + share, last)

    row_ids = jnp.arange(rows, dtype=jnp.int32)
    heads = head * group + row_ids
    columns = row(jnp.arange(width, dtype=jnp.int32), rows)
    mine = column(row_ids < group, width) & (columns < head_dim)
    at_b, at_head = jnp.full((rows, width), b, jnp.int32), column(heads, width)

    def run():
        q = plt.load(q_ref.at[at_b, at_head, columns], mask=mine, other=0.0)

        def tile(i, carry):
            top, total, acc = carry
            tokens = i * block + jnp.arange(block, dtype=jnp.int32)
            live = tokens < length
            if window:
                live &= tokens >= length - window
            k = load_tokens(k_ref, table_ref, b, head, tokens, live, width)
            scores = dot(q, k, 1) * (scale * LOG2E)
            scores = jnp.where(row(live, rows), scores, NEG)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_top[:, None])
            shrink = jnp.exp2(top - new_top)
            v = load_tokens(v_ref, table_ref, b, head, tokens, live, width)
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * shrink[:, None] + dot(weights.astype(v.dtype), v, 0)
            return new_top, total, acc

        start = (
            jnp.full((rows,), NEG, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, width), jnp.float32),
        )
        top, total, acc = lax.fori_loop(begin, end, tile, start)
        safe = jnp.maximum(total, TINY)
        out = acc / safe[:, None]
        if lse_ref is None:
            view = out_ref.at[at_b, at_head, columns]
            plt.store(view, out.astype(out_ref.dtype), mask=mine)
        else:
            at_split = jnp.full((rows, width), split, jnp.int32)
            plt.store(out_ref.at[at_b, at_split, at_head, columns], out, mask=mine)
            view = lse_ref.at[jnp.full_like(heads, b), heads, jnp.full_like(heads, split)]
            plt.store(view, top + jnp.log2(safe), mask=row_ids < group)

    if lse_ref is None:
        run()  # the only split: a row of length 0 still writes its zeros
    else:
        pl.when(begin < end)(run)


def _merge_kernel(
    partial_ref, lse_ref, length_ref, out_ref, *, width, block, splits, window
):  # fmt: skip
    head, b = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[-1]
    first, last, share = _share(length_ref[b], window=window, block=block, splits=splits)
    ids = jnp.arange(splits, dtype=jnp.int32)
    live = first + ids * share < last
    lse = plt.load(
        lse_ref.at[jnp.full_like(ids, b), jnp.full_like(ids, head), ids], mask=live, other=NEG
    )
    columns = jnp.arange(width, dtype=jnp.int32)
    at = [
        jnp.full((splits, width), b, jnp.int32),
        column(ids, width),
        jnp.full((splits, width), head, jnp.int32),
        row(columns, splits),
    ]
    mask = column(live, width) & (at[3] < head_dim)
    partial = plt.load(partial_ref.at[tuple(at)], mask=mask, other=0.0)
    weights = jnp.where(live, jnp.exp2(lse - jnp.max(lse, axis=0)), 0.0)
    out = jnp.sum(partial * weights[:, None], axis=0) / jnp.maximum(jnp.sum(weights), TINY)
    view = out_ref.at[jnp.full_like(columns, b), jnp.full_like(columns, head), columns]
    plt.store(view, out.astype(out_ref.dtype), mask=columns < head_dim)


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See pallas_kernels.paged_decode. interpret: run on any backend, slowly."""
    batch, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    if head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim} is above 256")
    device = current_device()
    if sizes is None:
        features = {
            "batch": batch, "kv_heads": kv_heads, "group": group, "head_dim": head_dim,
            "page_size": page_size, "itemsize": q.dtype.itemsize,
        }  # fmt: skip
        sizes = default_sizes(device, features)
    tiles = pl.cdiv(page_table.shape[1] * page_size, sizes.block)
    splits = sizes.splits or choose_splits(batch * kv_heads, tiles, device.cores)
    width = pl.next_power_of_2(head_dim)
    partials = [
        jax.ShapeDtypeStruct((batch, splits, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, splits), jnp.float32),
    ]
    whole = jax.ShapeDtypeStruct(q.shape, q.dtype)
    outs = triton_call(
        functools.partial(
            _attend_kernel, group=group, rows=max(MIN_ROWS, pl.next_power_of_2(group)),
            width=width, block=sizes.block, splits=splits, scale=scale, window=window,
        ),
        name="paged_decode",
        grid=(kv_heads, splits, batch),
        out_shape=partials if splits > 1 else [whole],
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
    )(q, k_pages, v_pages, page_table, lengths)  # fmt: skip
    if splits == 1:
        return outs[0]
    merge = functools.partial(
        _merge_kernel, width=width, block=sizes.block, splits=splits, window=window
    )
    return triton_call(
        merge,
        name="paged_decode_merge",
        grid=(heads, batch),
        out_shape=whole,
        num_warps=2,
        num_stages=1,
        interpret=interpret,
    )(*outs, lengths)
