"""Paged decode attention, Pallas on the Triton backend: split KV, merged by a second pass or, with
locks, by whoever comes last.

Grid (K, splits, B). One program holds one KV head of one row: its G query heads, padded to 16 rows
(the least a tensor-core product takes), stay in registers while the row's tokens stream by.

    row's tokens   |---tile---|---tile---|---tile---|---tile---|-last-|
    splits=2       |<----- split 0 ----->|<----- split 1 ----------->|      (its OWN tiles, halved)

    per tile:  page_table -> page ids -> K [block, H] --+
               q [16, H] (registers) -------------------+-> scores [16, block] -> softmax, online
               page ids -> V [block, H] ----------------+-> acc [16, H] float32 (registers)

    pass 1 writes   partial [B, splits, N, H] float32 and its log-sum-exp [B, N, splits]
    pass 2 grid (N, B) merges the splits that had work:   out [B, N, H]

    with locks [B*K], one launch:
    split 0   partial --> memory, barrier, lock += 1 (saw 0)
    split 2   partial --> memory, barrier, lock += 1 (saw 1)
    split 1   partial --> memory, barrier, lock += 1 (saw 2: the last of 3) --> merge, out, lock = 0

The number of splits is static (from B, K and the device), while lengths are not: a split without
tiles exits before it loads anything, and the merge reads only the splits that wrote. With one split
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
from pallas_kernels.paged_features import paged_features
from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.triton_ops import (
    base2_scores,
    ceil_div,
    check_pages,
    column,
    deal,
    dot,
    headroom,
    load_tokens,
    plt,
    row,
    scaled_queries,
)
from pallas_kernels.tuning import tuned

MIN_ROWS = 16
# float32 values of partial results that a program merges at once: 64 registers a thread, 4 warps
MERGED_AT_ONCE = 8192


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
    base = Sizes(block=32) if features["itemsize"] == 4 else Sizes()
    return dataclasses.replace(base, **tuned(device, "paged_decode", "triton", features))


def _share(length: Any, *, window: int | None, block: int, splits: int) -> tuple[Any, Any, Any]:
    """(first tile, last tile, tiles a split) of a row. Only the first splits may have work."""
    lowest = jnp.maximum(length - window, 0) if window else jnp.int32(0)
    first = lax.div(lowest, jnp.int32(block))
    last = ceil_div(length, block)
    return first, last, ceil_div(last - first, splits)


def _attend_kernel(
    q_ref, k_ref, v_ref, table_ref, length_ref, first_page_ref, *refs,
    group, rows, width, block, splits, scale, window, soft_cap, locked, num_warps, interpret,
):  # fmt: skip
    partial_ref: Any = None
    lse_ref: Any = None
    out_ref: Any = None
    lock_ref: Any = None
    if locked:
        _, partial_ref, lse_ref, out_ref, lock_ref = refs  # the lock goes in and out
    elif splits > 1:
        partial_ref, lse_ref = refs
    else:
        (out_ref,) = refs
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
    # A thread of a tensor-core product holds every (8 * warps)-th column of V. Dealt so that these
    # are neighbours in memory, fp8 columns are read as words and not byte by byte, which saves a
    # tenth of the loop's instructions and a quarter of its registers.
    turns = max(1, width // (8 * num_warps)) if v_ref.dtype.itemsize == 1 else 1

    def store_out(out):
        plt.store(out_ref.at[at_b, at_head, columns], out.astype(out_ref.dtype), mask=mine)

    def run():
        first_page = first_page_ref[0]
        q = plt.load(q_ref.at[at_b, at_head, columns], mask=mine, other=0.0)
        q, factor = scaled_queries(q, k_ref, scale)
        room = headroom(q.dtype)

        def tile(i, carry):
            top, total, acc = carry
            tokens = i * block + jnp.arange(block, dtype=jnp.int32)
            live = tokens < length
            if window:
                live &= tokens >= length - window
            k = load_tokens(k_ref, table_ref, first_page, b, head, tokens, live, width, q.dtype)
            scores = base2_scores(dot(q, k, 1), factor, soft_cap)
            scores = jnp.where(row(live, rows), scores, NEG)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) - room)
            weights = jnp.exp2(scores - new_top[:, None])
            shrink = jnp.exp2(top - new_top)
            v = load_tokens(v_ref, table_ref, first_page, b, head, tokens, live, width, q.dtype)
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * shrink[:, None] + dot(weights.astype(v.dtype), deal(v, turns), 0)
            return new_top, total, acc

        start = (
            jnp.full((rows,), NEG, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, width), jnp.float32),
        )
        top, total, acc = lax.fori_loop(begin, end, tile, start)
        safe = jnp.maximum(total, TINY)
        out = deal(acc / safe[:, None], width // turns)
        if partial_ref is None:
            store_out(out)
            return
        at_split = jnp.full((rows, width), split, jnp.int32)
        plt.store(partial_ref.at[at_b, at_split, at_head, columns], out, mask=mine)
        view = lse_ref.at[jnp.full_like(heads, b), heads, jnp.full_like(heads, split)]
        plt.store(view, top + jnp.log2(safe), mask=row_ids < group)
        if lock_ref is not None:
            merge_if_last()

    def merge_if_last():
        # the barrier orders every thread's stores before the one thread's atomic, which releases
        # them to, and acquires them from, the other programs. Interpreted programs run in sequence
        if not interpret:
            plt.debug_barrier()
        lock = b * pl.num_programs(0) + head
        working = ceil_div(last - first, share)
        before = plt.atomic_add(lock_ref, (lock,), jnp.int32(1))

        @pl.when(before == working - 1)
        def _():
            _merge_group(
                partial_ref, lse_ref, out_ref, b, head, working,
                group=group, width=width, splits=splits,
            )  # fmt: skip
            plt.store(lock_ref.at[lock], jnp.int32(0))

    if partial_ref is None:
        run()  # the only split: a row of length 0 still writes its zeros
        return
    pl.when(begin < end)(run)
    if lock_ref is not None:
        empty = functools.partial(store_out, jnp.zeros((rows, width), jnp.float32))
        pl.when((split == 0) & (first >= last))(empty)


def _merge_group(
    partial_ref, lse_ref, out_ref, b, head, working, *, group, width, splits
):  # fmt: skip
    """Merge the first `working` splits of one KV head's query heads into out_ref."""
    head_dim = out_ref.shape[-1]
    rows = pl.next_power_of_2(group)
    count = max(1, min(splits, MERGED_AT_ONCE // (rows * width)))
    shape = (count, rows, width)

    def spread(x, axis):
        return lax.broadcast_in_dim(x, shape, (axis,))

    row_ids = jnp.arange(rows, dtype=jnp.int32)
    heads, columns = head * group + row_ids, jnp.arange(width, dtype=jnp.int32)

    def some(i, carry):
        top, total, acc = carry
        ids = i * count + jnp.arange(count, dtype=jnp.int32)
        live = column(ids < working, rows) & row(row_ids < group, count)
        # volatile: read from the L2, where the other programs' stores are, not from the L1
        lse = plt.load(
            lse_ref.at[
                jnp.full((count, rows), b, jnp.int32), row(heads, count), column(ids, rows)
            ],
            mask=live, other=NEG, volatile=True,
        )  # fmt: skip
        at = jnp.full(shape, b, jnp.int32), spread(ids, 0), spread(heads, 1), spread(columns, 2)
        mask = (at[1] < working) & (spread(row_ids, 1) < group) & (at[3] < head_dim)
        partial = plt.load(partial_ref.at[at], mask=mask, other=0.0, volatile=True)
        new_top = jnp.maximum(top, jnp.max(lse, axis=0))
        weights = jnp.where(live, jnp.exp2(lse - row(new_top, count)), 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=0)
        share = jnp.sum(partial * lax.broadcast_in_dim(weights, shape, (0, 1)), axis=0)
        return new_top, total, acc * column(shrink, width) + share

    start = (
        jnp.full((rows,), NEG, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    _, total, acc = lax.fori_loop(0, ceil_div(working, count), some, start)
    out = acc / column(jnp.maximum(total, TINY), width)
    at_column = row(columns, rows)
    view = out_ref.at[jnp.full((rows, width), b, jnp.int32), column(heads, width), at_column]
    mask = column(row_ids < group, width) & (at_column < head_dim)
    plt.store(view, out.astype(out_ref.dtype), mask=mask)


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


def plan(q: Any, k_pages: Any, page_table: Any, sizes: Sizes | None = None) -> Sizes:
    """Sizes with the splits chosen, for arrays or their specs. Raises NotImplementedError for what
    the kernel cannot do."""
    batch, _, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    if head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim} is above 256")
    check_pages(k_pages)
    device = current_device()
    if sizes is None:
        features = {"batch": batch, **paged_features(q, k_pages)}
        sizes = default_sizes(device, features)
    tiles = pl.cdiv(page_table.shape[1] * page_size, sizes.block)
    splits = sizes.splits or choose_splits(batch * kv_heads, tiles, device.cores)
    return dataclasses.replace(sizes, splits=splits)


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
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> Any:
    """See pallas_kernels.paged_decode. interpret: run on any backend, slowly."""
    batch, heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    sizes = plan(q, k_pages, page_table, sizes)
    splits = sizes.splits
    width = pl.next_power_of_2(head_dim)
    whole = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if first_page is None:
        first_page = jnp.zeros(1, jnp.int32)
    arrays = [q, k_pages, v_pages, page_table, lengths, first_page]
    out_shape, aliases = [whole], {}
    if splits > 1:
        partials = [
            jax.ShapeDtypeStruct((batch, splits, heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, splits), jnp.float32),
        ]
        out_shape = partials
        if locks is not None:
            out_shape = [*partials, whole, jax.ShapeDtypeStruct(locks.shape, locks.dtype)]
            arrays, aliases = [*arrays, locks], {6: 3}
    outs = triton_call(
        functools.partial(
            _attend_kernel, group=group, rows=max(MIN_ROWS, pl.next_power_of_2(group)),
            width=width, block=sizes.block, splits=splits, scale=scale, window=window,
            soft_cap=soft_cap, locked=bool(aliases), num_warps=sizes.num_warps, interpret=interpret,
        ),
        name="paged_decode",
        grid=(kv_heads, splits, batch),
        out_shape=out_shape,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
        aliases=aliases,
    )(*arrays)  # fmt: skip
    if aliases:
        return outs[2], outs[3]
    if splits == 1:
        return outs[0] if locks is None else (outs[0], locks)
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
