"""Paged prefill attention, Pallas on the Mosaic GPU backend, for Hopper (TMA, mbarriers, wgmma).

Grid (programs,), one program a multiprocessor, each with a list of work: item = one tile of queries
of one KV head. A tile has 128 rows, which are (tokens x `packed` query heads of the KV head):

    row r of a warpgroup's 64  ->  head r // tokens, token r % tokens      tokens = 64 / packed

    items, heaviest first      0  1  2  3 | 4  5  6  7 | 8 ...     (a tile's heads are adjacent)
    program that takes each    0  1  2  3   3  2  1  0   0 ...     to and fro: sums come out equal

Three warpgroups, which run through the items without a pause between them:

    loader     work, page_table -> TMA --> q tiles of the next item; ring of `stages` tiles:
                                           K [block, H], V [block, H], one TMA a page
                                                     | full barriers     ^ free barriers (2 arrive)
    compute 0  rows  0 ..  63:  q [64, H] shared -- wgmma K --> scores -- wgmma V --> acc float32
    compute 1  rows 64 .. 127:  the same, over the same tiles of keys

    keys   0 ....................... first query ........ last query of the tile
           |-- no mask ------------->|<---- masked ----->|     (with a window, masked below it too;
                                                                with reach, from the nearest that a
                                                                row ends at to the farthest)

Step i of a compute warpgroup does acc += P(i) V(i), then S(i+1) = q K(i+1), then makes P(i+1) of
S(i+1). The two warpgroups take turns, so that one's softmax runs beside the other's products:

    compute 0   products | softmax ........ | products | softmax ........ |
    compute 1            | products | softmax ........ | products | softmax ........

Output goes registers -> shared (over q) -> TMA while the next item runs; at a sequence's end in
pieces of 8 rows, each only where it holds a live token, so a tile never writes into the next
sequence. TMA addresses packed rows in tiles of 8: that is why sequences start at multiples of 8.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.device import Device, current_device
from pallas_kernels.mosaic_ops import (
    TRANSFORMS,
    WGMMA,
    add_values,
    ceil_div,
    check_case,
    i32,
    issue_pages,
    plgpu,
    ring,
    scores_of,
    spread,
    start_softmax,
    transforms,
    weigh,
    zero_outside,
)
from pallas_kernels.paged_decode.splits import HOPPER_CORES
from pallas_kernels.paged_features import paged_features
from pallas_kernels.paged_prefill.plan import FIXED_TILE, plan_work, tile_reach
from pallas_kernels.softmax import TINY
from pallas_kernels.tuning import tuned

ROWS = 64  # rows of a compute warpgroup
COMPUTE = 2  # compute warpgroups
# registers a thread: 2 x 128 x 232 + 128 x 40 is just within the 64 K of a multiprocessor
COMPUTE_REGISTERS, LOADER_REGISTERS = 232, 40
HEAD_DIMS = (64, 96, 128, 256)
SHARED_BYTES = 226 * 1024  # of a multiprocessor's 227 KiB; the rest is for barriers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block: keys a step, a multiple of the page size. stages: tiles in flight, at least 2. packed:
    query heads in a tile, a divisor of the group up to 8; 0 chooses. turns: 1 alternates the
    warpgroups. programs: 0 is one a multiprocessor. queries: items whose queries are in shared
    memory; with 1 an item's are loaded when the output before has left."""

    block: int = 128
    stages: int = 2
    packed: int = 0
    turns: int = 1
    programs: int = 0
    queries: int = 2


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any; a tile holds at least one page."""
    base = Sizes(stages=4) if features["head_dim"] <= 64 else Sizes()
    if features["head_dim"] > 128:  # of more keys a step, registers spill
        base = Sizes(block=64, queries=1)
    sizes = dataclasses.replace(base, **tuned(device, "paged_prefill", "mosaic_sm90", features))
    if features["page_size"] <= sizes.block:
        return sizes
    return dataclasses.replace(sizes, block=min(features["page_size"], 128), stages=2)


def choose_packed(group: int) -> int:
    """Query heads in a tile: the largest power of two up to 8 that divides the group. Packing cuts
    the rows that a sequence's last tile wastes; with a power of two it wastes none itself."""
    return min(group & -group, 8)


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
    interpret: Any = None,
) -> jax.Array:
    """See pallas_kernels.paged_prefill. interpret: compat.mosaic_interpreter() to run on a CPU."""
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    dtype = q.dtype
    device = current_device()
    if sizes is None:
        features = {"tokens": tokens, **paged_features(q, k_pages)}
        sizes = default_sizes(device, features)
    block, stages, queries = sizes.block, sizes.stages, sizes.queries
    check_case(dtype, k_pages.dtype, page_size, head_dim, block, HEAD_DIMS)
    packed = sizes.packed or choose_packed(group)
    if packed > 8 or group % packed or stages < 2:
        raise NotImplementedError(
            f"{packed} of {group} query heads in a tile, {stages} stages: needs a divisor of the "
            "group up to 8, and 2 stages"
        )
    shared = (queries * COMPUTE * ROWS + 2 * stages * block) * head_dim * dtype.itemsize
    if shared > SHARED_BYTES:
        raise NotImplementedError(
            f"{stages} stages of {block} keys: {shared} bytes of shared memory, of {SHARED_BYTES}"
        )
    pages = block // page_size
    own = ROWS // packed // 8 * 8  # tokens of a warpgroup: a power of two
    tile = own * COMPUTE
    if fixed_tiles and FIXED_TILE % tile:
        raise NotImplementedError(f"tiles of {tile} tokens do not divide {FIXED_TILE}")
    units = heads // packed  # items a tile of tokens
    work, used = plan_work(
        q_starts, q_lens, prefix_lens, tokens, tile=tile, block=block, window=window, reach=reach
    )
    limits = () if reach is None else (_rows_reach(reach, work, tile, packed),)
    cores = sizes.programs or device.cores or HOPPER_CORES
    programs = min(cores, work.shape[0] * units)
    turns = bool(sizes.turns)

    def body(q_ref, k_ref, v_ref, table_ref, first_page_ref, work_ref, used_ref, *refs):
        limits_ref, refs = refs[: len(limits)], refs[len(limits) :]
        out_ref, q_tiles, k_tiles, v_tiles, k_full, v_full, *refs = refs
        k_free, v_free, q_full, q_free, turn, *staging = refs
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        items = used_ref[0] * units
        whole = lax.div(items, i32(programs))

        def place(turn_number):
            return jnp.where(lax.rem(turn_number, i32(2)) == 0, program, programs - 1 - program)

        rounds = whole + (place(whole) < items - whole * programs).astype(jnp.int32)

        def item(number):
            """(first query head, packed row, tokens left, position, sequence) of an item; with
            reach also the least and the greatest of it, and the row of limits."""
            index = number * programs + place(number)
            row = jnp.minimum(lax.div(index, i32(units)), work.shape[0] - 1)
            unit = lax.rem(index, i32(units))
            fields = (work_ref[row, field] for field in range(work.shape[1]))
            return (unit * packed, *fields, *(row for _ in limits))

        def key_range(left, position, bounds):
            """(first tile of keys, tiles, lowest key seen, one past the sequence's last key)."""
            lowest = jnp.maximum(position - (window - 1), 0) if window else i32(0)
            first = lax.div(lowest, i32(block))
            end = bounds[1] + 1 if bounds else position + jnp.minimum(left, tile)
            return first, ceil_div(end, block) - first, lowest, position + left

        def q_slot(number, which):
            return lax.rem(number, i32(queries)) * COMPUTE + which

        @pl.when(warpgroup < COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            mine = staging[0].at[warpgroup] if staging else None

            def take_turn():
                if turns:
                    plgpu.barrier_wait(turn.at[warpgroup])

            def pass_turn():
                if turns:
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])

            def one_item(number, carry):
                done, head, row, left, position, _sequence, *bounds = carry
                following = item(number + 1)  # early: the loads from memory take a while
                first, blocks, lowest, sequence_end = key_range(left, position, bounds)
                q_tile = q_tiles.at[q_slot(number, warpgroup)]
                base = warpgroup * own  # of this warpgroup's tokens
                limit = None
                if bounds:
                    of_rows = limits_ref[0].at[bounds[2], warpgroup]
                    limit = compat.mosaic_load(of_rows, WGMMA.reduce(1))

                def slot_of(i):
                    return lax.rem(done + i, i32(stages))

                def soften(i, top, total, masked, scores):
                    seen = None
                    if masked:
                        iota = functools.partial(
                            plgpu.broadcasted_iota, jnp.int32, (ROWS, block), layout=WGMMA
                        )
                        key = (first + i) * block + iota(1)
                        query = position + base + (iota(0) & (own - 1))
                        seen = key <= (query if limit is None else spread(limit, key.shape))
                        if window:
                            seen &= key > query - window
                    weights, top, total, shrink = weigh(
                        scores, top, total, scale=scale, soft_cap=soft_cap, seen=seen
                    )
                    return weights.astype(dtype), top, total, shrink

                def step(i, carry, *, masked):
                    """The values of tile i, the scores and weights of tile i + 1."""
                    weights, top, total, acc = carry
                    slot, ahead_slot = slot_of(i), slot_of(i + 1)
                    plgpu.barrier_wait(v_full.at[slot])
                    if window:
                        first_token = (first + i) * block
                        zero_outside(v_tiles.at[slot], first_token, lowest, sequence_end)
                    plgpu.barrier_wait(k_full.at[ahead_slot])
                    take_turn()
                    acc = add_values(acc, weights, v_tiles.at[slot], mine)
                    plgpu.barrier_arrive(v_free.at[slot])
                    k_tile = k_tiles.at[ahead_slot]
                    scores = scores_of(q_tile, k_tile, ROWS, block, issued=pass_turn)
                    plgpu.barrier_arrive(k_free.at[ahead_slot])
                    weights, top, total, shrink = soften(i + 1, top, total, masked, scores)
                    return weights, top, total, acc * spread(shrink, acc.shape)

                def free_last():
                    @pl.when(number > 0)
                    def _():  # by now the last item's output has left its buffer
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(q_free.at[q_slot(number - 1, warpgroup)])

                if queries == 1:
                    free_last()
                plgpu.barrier_wait(q_full.at[q_slot(number, warpgroup)])
                plgpu.barrier_wait(k_full.at[slot_of(0)])
                scores = scores_of(q_tile, k_tiles.at[slot_of(0)], ROWS, block)
                plgpu.barrier_arrive(k_free.at[slot_of(0)])

                if queries > 1:
                    free_last()
                top, total, acc = start_softmax(ROWS, head_dim)
                weights, top, total, _shrink = soften(i32(0), top, total, True, scores)

                # step i masks tile i + 1. Tiles below free_end are seen whole by every row
                last = blocks - 1
                nearest = bounds[0] if bounds else position
                free_end = jnp.clip(lax.div(nearest + 1, i32(block)) - first - 1, 0, last)
                free_begin = i32(0)
                carry = weights, top, total, acc
                masked, free = (functools.partial(step, masked=flag) for flag in (True, False))
                if window:
                    lowest_of_last = jnp.maximum(position + jnp.minimum(left, tile) - window, 0)
                    free_begin = ceil_div(lowest_of_last, block) - first - 1
                    free_begin = jnp.clip(free_begin, 0, free_end)
                    carry = lax.fori_loop(0, free_begin, masked, carry)
                carry = lax.fori_loop(free_begin, free_end, free, carry)
                weights, top, total, acc = lax.fori_loop(free_end, last, masked, carry)

                slot = slot_of(last)
                plgpu.barrier_wait(v_full.at[slot])
                zero_outside(v_tiles.at[slot], (first + last) * block, lowest, sequence_end)
                take_turn()
                acc = add_values(acc, weights, v_tiles.at[slot], mine)
                pass_turn()
                plgpu.barrier_arrive(v_free.at[slot])

                acc = acc / spread(jnp.maximum(total, TINY), acc.shape)
                q_tile[...] = acc.astype(dtype)
                plgpu.commit_smem()

                def send(head_at, start, count):
                    source = q_tile.at[pl.ds(head_at * own + start, count)]
                    rows = pl.ds(pl.multiple_of(row + base + start, 8), count)
                    plgpu.copy_smem_to_gmem(source, out_ref.at[rows, head + head_at])

                @pl.when(base + own <= left)
                def _():
                    for head_at in range(packed):
                        send(head_at, 0, own)

                @pl.when(base + own > left)
                def _():
                    for start in range(0, own, 8):

                        @pl.when(base + start < left)
                        def _(start=start):
                            for head_at in range(packed):
                                send(head_at, start, 8)

                return done + blocks, *following

            if turns:
                pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            lax.fori_loop(0, rounds, one_item, (i32(0), *item(i32(0))))
            plgpu.wait_smem_to_gmem(0)
            # the interpreter insists that every phase of a barrier is observed
            pl.when(rounds > 0)(
                lambda: plgpu.barrier_arrive(q_free.at[q_slot(rounds - 1, warpgroup)])
            )
            if turns:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

        @pl.when(warpgroup == COMPUTE)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def one_item(number, done):
                head, row, left, position, sequence, *bounds = item(number)
                first, blocks, _lowest, sequence_end = key_range(left, position, bounds)
                last_page = jnp.maximum(ceil_div(sequence_end, page_size) - 1, 0)
                kv_head = lax.div(head, i32(group))
                for which in range(COMPUTE):
                    slot = q_slot(number, which)
                    pl.when(number >= queries)(
                        functools.partial(plgpu.barrier_wait, q_free.at[slot])
                    )
                    rows = pl.ds(pl.multiple_of(row + which * own, 8), own)
                    for head_at in range(packed):
                        target = q_tiles.at[slot, pl.ds(head_at * own, own)]
                        plgpu.copy_gmem_to_smem(
                            q_ref.at[rows, head + head_at], target, q_full.at[slot]
                        )

                @pl.loop(0, blocks)
                def _(i):
                    slot = lax.rem(done + i, i32(stages))
                    at = (first + i) * pages
                    ids = [
                        table_ref[sequence, jnp.minimum(at + j, last_page)] + first_page_ref[0]
                        for j in range(pages)
                    ]

                    @pl.when(done + i >= stages)
                    def _():
                        plgpu.barrier_wait(k_free.at[slot])

                    issue_pages(ids, kv_head, slot, page_size, k_ref, k_tiles, k_full)

                    @pl.when(done + i >= stages)
                    def _():
                        plgpu.barrier_wait(v_free.at[slot])

                    issue_pages(ids, kv_head, slot, page_size, v_ref, v_tiles, v_full)

                return done + blocks

            done = lax.fori_loop(0, rounds, one_item, i32(0))

            # every phase of a barrier is observed before it dies: the interpreter insists on it
            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(i):
                plgpu.barrier_wait(k_free.at[lax.rem(i, i32(stages))])
                plgpu.barrier_wait(v_free.at[lax.rem(i, i32(stages))])

            @pl.loop(jnp.maximum(rounds - queries, 0), rounds)
            def _(number):
                for which in range(COMPUTE):
                    plgpu.barrier_wait(q_free.at[q_slot(number, which)])

    if first_page is None:
        first_page = jnp.zeros(1, jnp.int32)
    scratch: list[Any] = [
        plgpu.SMEM((queries * COMPUTE, ROWS, head_dim), dtype, transforms=transforms(head_dim)),
        *ring(stages, block, head_dim, dtype, pages, readers=COMPUTE),
        plgpu.Barrier(num_arrivals=packed, num_barriers=queries * COMPUTE),
        plgpu.Barrier(num_barriers=queries * COMPUTE),
        plgpu.Barrier(num_barriers=COMPUTE),
    ]
    options: dict[str, Any] = {}
    if interpret is not None:
        scratch.append(plgpu.SMEM((COMPUTE, ROWS, block), dtype, transforms=TRANSFORMS))
        options["interpret"] = interpret
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(q, k_pages, v_pages, page_table, first_page, work, used, *limits)


def _rows_reach(reach: jax.Array, work: jax.Array, tile: int, packed: int) -> jax.Array:
    """[n, COMPUTE, ROWS]: the reach of each row of each warpgroup's tile; rows without a token see
    the first key."""
    tokens = tile_reach(reach, work[:, 0], work[:, 1], tile).reshape(-1, COMPUTE, tile // COMPUTE)
    rows = jnp.tile(tokens, packed)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, ROWS - rows.shape[-1])))
