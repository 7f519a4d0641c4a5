"""Paged decode attention, Pallas on the Triton backend: split KV, merged by a second launch, or by
one of the splits with the help of locks.

Grid (K, splits, B). One program holds one KV head of one row: its G query heads, padded to 16 rows
(the least a tensor-core product takes), stay in registers while its tiles of tokens stream by.

    row's tokens   |--tile 0--|--tile 1--|--tile 2--|--tile 3--|-4-|
    splits=2       split 0    split 1    split 0    split 1    split 0

    at once:   length, first page, q [16, H], page id of the first tile
    per tile:  page id -> K [block, H] --+
               q (registers) ------------+-> scores [16, block] -> softmax, online
               page id -> V [block, H] ----> acc [16, H] float32 (registers)
               page id of the next tile

With few rows the time is a chain of waits for memory, so each of them counts: the first tile of a
split does not depend on the length (without a window), and ids are loaded a tile ahead. A tile that
lies in one page needs one id, one that spans pages or parts of them an id for each token.

    without locks, two launches:
    pass 1 writes   partial [B, splits, N, H] float32 and its log-sum-exp
    pass 2 grid (N, B) merges the splits that had work:   out [B, N, H]

    with locks [B*K], one launch, by counting:
    split 0   partial --> memory, barrier, lock += 1 (saw 0)
    split 2   partial --> memory, barrier, lock += 1 (saw 1)
    split 1   partial --> memory, barrier, lock += 1 (saw 2: the last of 3) --> merge, out, lock = 0

    with locks and exchange=1, one launch:
    split 0   partial --> locks
    split 1   partial --> locks
    split 2   partial --> locks, reads until no word of the three is 0 --> merge, out, words = 0

The number of splits is static (from B, K and the device), while lengths are not: a split without
tiles exits before it loads any, the merge reads only the splits that wrote, and a split that is
alone writes the output itself. Each K and V byte of live tokens is read once, and no others.
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
from pallas_kernels.paged_decode.splits import HOPPER_CORES, choose_splits
from pallas_kernels.paged_decode.triton_merge import COPIES, Exchange, Group, Partials, merge
from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.triton_ops import (
    base2_scores,
    ceil_div,
    check_pages,
    column,
    divmod_by,
    dot,
    load_slots,
    load_tokens,
    plt,
    row,
)
from pallas_kernels.tuning import tuned

MIN_ROWS = 16
# float32 values of partial results that a warp merges at once: 128 registers a thread, so that 32
# splits of 4 heads x 128 take one round (a second one waits for memory again)
MERGED_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block: tokens a tile, a power of two from 16. splits: programs that share a row, a power of
    two; 0 chooses. prefetch_ids: 1 loads page ids a tile ahead, and num_stages - 1 tiles are in
    flight; 0 loads them with the tile, which halves the pipeline: num_stages 3 has one tile in
    flight, 5 two. num_stages 1 loads V only after K. exchange: with locks, 1 merges through words
    of them (`exchange_words` of them) instead of counting in them."""

    block: int = 64
    splits: int = 0
    num_warps: int = 4
    num_stages: int = 3
    prefetch_ids: int = 1
    exchange: int = 0


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    base = Sizes(block=32) if features["itemsize"] == 4 else Sizes()
    return dataclasses.replace(base, **tuned(device, "paged_decode", "triton", features))


def exchange_words(batch: int, kv_heads: int, group: int, head_dim: int, splits: int) -> int:
    """The least size of `locks` for Sizes(exchange=1, splits=splits)."""
    return Group(group, head_dim, kv_heads, splits).words(batch)


def _tiles(length: Any, *, window: int | None, block: int) -> tuple[Any, Any]:
    """(first tile, one past the last tile) of a row. Without a window the first does not depend on
    the length, which is still on its way."""
    first = jnp.int32(0)
    if window:
        first = lax.div(jnp.maximum(length - window, 0), jnp.int32(block))
    return first, ceil_div(length, block)


def _attend_kernel(
    q_ref, k_ref, v_ref, table_ref, length_ref, first_page_ref, *refs,
    group, rows, block, scale, window, soft_cap, way, prefetch_ids, interpret,
):  # fmt: skip
    partial_ref: Any = None
    lse_ref: Any = None
    out_ref: Any = None
    lock_ref: Any = None
    if way == "direct":
        (out_ref,) = refs
    elif way == "launch":
        partial_ref, lse_ref = refs
    elif way == "count":
        _, partial_ref, lse_ref, out_ref, lock_ref = refs  # the lock goes in and out
    else:
        _, out_ref, lock_ref = refs
    head, split, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, width = group.splits, group.width
    page_size, table_width = k_ref.shape[1], table_ref.shape[1]
    length = length_ref[b]
    first, last = _tiles(length, window=window, block=block)
    begin = first + split
    working = jnp.minimum(last - first, splits)

    row_ids = jnp.arange(rows, dtype=jnp.int32)
    columns = row(jnp.arange(width, dtype=jnp.int32), rows)
    mine = group.inside(column(row_ids, width), columns)
    at_head = column(head * group.heads + row_ids, width)
    at_q = jnp.full((rows, width), b, jnp.int32), at_head, columns

    def store_out(out):
        plt.store(out_ref.at[at_q], out.astype(out_ref.dtype), mask=mine)

    def load_ids(tile, **options):
        """Pages of a tile: one for all of it, or [block]. Past the table its last entry."""
        at = tile * block
        if page_size % block:
            at = at + jnp.arange(block, dtype=jnp.int32)
            index = jnp.minimum(divmod_by(at, page_size)[0], table_width - 1)
            return plt.load(table_ref.at[jnp.full_like(index, b), index], **options)
        index = jnp.minimum(divmod_by(at, page_size)[0], table_width - 1)
        return plt.load(table_ref.at[b, index], **options)

    # nothing here waits for the length: it, the query and the first pages arrive together.
    # Volatile, or ptxas moves the loads behind the branch that needs the length, to their use
    first_page = plt.load(first_page_ref.at[jnp.int32(0)], volatile=True)
    first_ids = load_ids(begin, volatile=True) if prefetch_ids else jnp.int32(0)
    q = plt.load(q_ref.at[at_q], mask=mine, other=0.0)

    def run():
        def tile(i, carry):
            top, total, acc, ids = carry
            at = (begin + i * splits) * block
            tokens = at + jnp.arange(block, dtype=jnp.int32)
            live = tokens < length
            if window:
                live &= tokens >= length - window
            if prefetch_ids:
                slots = divmod_by(tokens, page_size)[1]
                place = ids + first_page, slots, head, live, width, q.dtype
                k, v = load_slots(k_ref, *place), load_slots(v_ref, *place)
                ids = load_ids(begin + (i + 1) * splits)
            else:
                place = table_ref, first_page, b, head, tokens, live, width, q.dtype
                k, v = load_tokens(k_ref, *place), load_tokens(v_ref, *place)
            scores = base2_scores(dot(q, k, 1), scale, soft_cap)
            scores = jnp.where(row(live, rows), scores, NEG)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_top[:, None])
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * shrink[:, None] + dot(weights.astype(v.dtype), v, 0)
            return new_top, total, acc, ids

        start = (
            jnp.full((rows,), NEG, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, width), jnp.float32),
            first_ids,
        )
        count = ceil_div(last - begin, splits)
        top, total, acc, _ = lax.fori_loop(0, count, tile, start)
        safe = jnp.maximum(total, TINY)
        share(acc / safe[:, None], top + jnp.log2(safe))

    def share(out, lse):
        if way == "direct":
            store_out(out)
        elif way == "launch":
            Partials(group, b, head, partial_ref, lse_ref).put(split, out, lse)
        else:
            pl.when(working == 1)(lambda: store_out(out))
            together = count_and_merge if way == "count" else exchange_and_merge
            pl.when(working > 1)(lambda: together(out, lse))

    def count_and_merge(out, lse):
        partials = Partials(group, b, head, partial_ref, lse_ref)
        partials.put(split, out, lse)
        # the barrier orders every thread's stores before the one thread's atomic, which releases
        # them to, and acquires them from, the other programs. Interpreted programs run in sequence
        if not interpret:
            plt.debug_barrier()
        lock = b * group.kv_heads + head
        before = plt.atomic_add(lock_ref, (lock,), jnp.int32(1))

        @pl.when(before == working - 1)
        def _():
            store_merged(merge(group, partials.get, working))
            plt.store(lock_ref.at[lock], jnp.int32(0))

    def exchange_and_merge(out, lse):
        exchange = Exchange(group, q_ref.shape[0], b, head, lock_ref, interpret)
        exchange.put(split, out, lse)

        # The last one cannot wait for a program that has no room to run: programs start in the
        # order of their numbers, and those that wait are no more than there are cores, each of
        # which holds several
        @pl.when(split == working - 1)
        def _():
            store_merged(merge(group, exchange.get, working))
            exchange.clear(working)

    def store_merged(out):
        ids = column(jnp.arange(group.rows, dtype=jnp.int32), width)
        at_column = row(jnp.arange(width, dtype=jnp.int32), group.rows)
        view = out_ref.at[jnp.full_like(ids, b), head * group.heads + ids, at_column]
        plt.store(view, out.astype(out_ref.dtype), mask=group.inside(ids, at_column))

    if way == "direct":
        run()  # the only split: a row of length 0 still writes its zeros
        return
    pl.when(begin < last)(run)
    if out_ref is not None:
        empty = functools.partial(store_out, jnp.zeros((rows, width), jnp.float32))
        pl.when((split == 0) & (first >= last))(empty)


def _merge_kernel(
    partial_ref, lse_ref, length_ref, out_ref, *, width, block, splits, window
):  # fmt: skip
    head, b = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[-1]
    first, last = _tiles(length_ref[b], window=window, block=block)
    ids = jnp.arange(splits, dtype=jnp.int32)
    live = first + ids < last
    lse = plt.load(
        lse_ref.at[jnp.full_like(ids, b), ids, jnp.full_like(ids, head), jnp.full_like(ids, 0)],
        mask=live,
        other=NEG,
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
    page_size, kv_heads = k_pages.shape[1:3]
    if head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim} is above 256")
    check_pages(k_pages)
    device = current_device()
    if sizes is None:
        features = {
            "batch": batch, "kv_heads": kv_heads, "group": heads // kv_heads, "head_dim": head_dim,
            "page_size": page_size, "itemsize": q.dtype.itemsize,
        }  # fmt: skip
        sizes = default_sizes(device, features)
    tiles = pl.cdiv(page_table.shape[1] * page_size, sizes.block)
    splits = sizes.splits or choose_splits(batch * kv_heads, tiles, device.cores)
    group = Group(heads // kv_heads, head_dim, kv_heads, splits)
    at_once = MERGED_AT_ONCE * sizes.num_warps // (group.rows * group.width)
    group = dataclasses.replace(group, at_once=max(1, min(splits, at_once)))
    way = "exchange" if sizes.exchange else "count"
    if splits == 1 or locks is None:
        way = "direct" if splits == 1 else "launch"
    whole = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if first_page is None:
        first_page = jnp.zeros(1, jnp.int32)
    arrays = [q, k_pages, v_pages, page_table, lengths, first_page]
    out_shape: list[Any] = []
    if way in ("launch", "count"):
        out_shape += [
            jax.ShapeDtypeStruct((batch, splits, heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, splits, heads, COPIES), jnp.float32),
        ]
    if way != "launch":
        out_shape.append(whole)
    aliases = {}
    if locks is not None and splits > 1:
        if way == "exchange":
            _check_exchange(locks.size, group, batch, device.cores)
        aliases = {len(arrays): len(out_shape)}
        arrays.append(locks)
        out_shape.append(jax.ShapeDtypeStruct(locks.shape, locks.dtype))
    outs = triton_call(
        functools.partial(
            _attend_kernel, group=group, rows=max(MIN_ROWS, group.rows), block=sizes.block,
            scale=scale, window=window, soft_cap=soft_cap, way=way,
            prefetch_ids=sizes.prefetch_ids, interpret=interpret,
        ),
        name="paged_decode",
        grid=(kv_heads, splits, batch),
        out_shape=out_shape,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
        aliases=aliases,
    )(*arrays)  # fmt: skip
    if way == "direct":
        return outs[0] if locks is None else (outs[0], locks)
    if way != "launch":
        return tuple(outs[-2:])
    second = functools.partial(
        _merge_kernel, width=group.width, block=sizes.block, splits=splits, window=window
    )
    return triton_call(
        second,
        name="paged_decode_merge",
        grid=(heads, batch),
        out_shape=whole,
        num_warps=2,
        num_stages=1,
        interpret=interpret,
    )(*outs, lengths)


def _check_exchange(words: int, group: Group, batch: int, cores: int) -> None:
    need, waiting = group.words(batch), batch * group.kv_heads
    if words < need:
        raise ValueError(f"locks has {words} words: exchange=1 takes {need}")
    if waiting > (cores or HOPPER_CORES):
        raise ValueError(f"exchange=1 with {waiting} rows * KV heads: more than there are cores")
