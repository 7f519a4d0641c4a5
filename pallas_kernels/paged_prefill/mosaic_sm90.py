"""Paged prefill attention, Pallas on the Mosaic GPU backend, for Hopper (TMA, mbarriers, wgmma).

Grid (N, tiles). A tile is 128 query tokens of one sequence and one query head; plan.py says which.
Three warpgroups:

    loader     page_table -> one TMA a page --> ring of `stages` tiles: K [block, H], V [block, H]
                                                     | full barriers     ^ free barriers (2 arrive)
    compute 0  queries  0 ..  63:  q [64, H] shared -- wgmma K --> scores -- wgmma V --> acc float32
    compute 1  queries 64 .. 127:  the same; each waits through the tiles only the other needs

    keys   0 ....................... first query ....... last query of the warpgroup
           |-- no mask (no window) -->|<---- masked ---->|

Output goes registers -> shared (over q) -> TMA in pieces of 8 rows, each only where it holds a live
token, so a tile never writes into the next sequence. TMA addresses the packed rows in tiles of 8:
that is why every sequence starts at a multiple of 8.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.device import Device, current_device
from pallas_kernels.mosaic_ops import (
    TRANSFORMS,
    WGMMA,
    add_values,
    ceil_div,
    check_case,
    i32,
    issue_pages,
    load_ring,
    plgpu,
    ring,
    scores_of,
    spread,
    start_softmax,
    zero_outside,
)
from pallas_kernels.paged_prefill.plan import plan_tiles
from pallas_kernels.softmax import LOG2E, NEG, TINY
from pallas_kernels.tuning import tuned

ROWS = 64  # queries of a compute warpgroup
COMPUTE = 2  # compute warpgroups
# registers a thread: 2 x 128 x 232 + 128 x 40 is just within the 64 K of a multiprocessor
COMPUTE_REGISTERS, LOADER_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block: keys a step, a multiple of the page size. stages: tiles in flight."""

    block: int = 64
    stages: int = 4


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any; a tile holds at least one page."""
    sizes = dataclasses.replace(Sizes(), **tuned(device, "paged_prefill", "mosaic_sm90", features))
    if features["page_size"] <= sizes.block:
        return sizes
    return Sizes(block=min(features["page_size"], 128), stages=2)


def paged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    q_lens: jax.Array,
    prefix_lens: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sizes: Sizes | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See pallas_kernels.paged_prefill. interpret: compat.mosaic_interpreter() to run on a CPU."""
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    dtype = q.dtype
    if sizes is None:
        features = {
            "tokens": tokens, "kv_heads": kv_heads, "group": group, "head_dim": head_dim,
            "page_size": page_size, "itemsize": dtype.itemsize,
        }  # fmt: skip
        sizes = default_sizes(current_device(), features)
    block, stages = sizes.block, sizes.stages
    check_case(dtype, page_size, head_dim, block)
    pages = block // page_size

    def body(
        q_ref, k_ref, v_ref, table_ref, start_ref, len_ref, prefix_ref, sequence_ref, offset_ref,
        out_ref, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free, q_full, staging=None,
    ):  # fmt: skip
        head, number = lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        sequence = sequence_ref[number]
        known = jnp.maximum(sequence, 0)
        offset, row0, prefix = offset_ref[number], start_ref[known], prefix_ref[known]
        count = jnp.where(sequence >= 0, len_ref[known], 0)
        kv_head = lax.div(head, i32(group))
        sequence_end = prefix + count
        tile_end = prefix + jnp.minimum(offset + ROWS * COMPUTE, count)
        lowest = jnp.maximum(prefix + offset - (window - 1), 0) if window else i32(0)
        first = lax.div(lowest, i32(block))
        blocks = jnp.where(offset < count, ceil_div(tile_end, block) - first, 0)
        last_page = jnp.maximum(ceil_div(sequence_end, page_size) - 1, 0)

        @pl.when((warpgroup < COMPUTE) & (blocks > 0))
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            base = offset + warpgroup * ROWS
            q_tile = q_tiles.at[warpgroup]
            rows = pl.multiple_of(row0 + base, 8)
            plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(rows, ROWS), head], q_tile, q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])
            own_end = prefix + jnp.minimum(base + ROWS, count)
            own = jnp.where(base < count, ceil_div(own_end, block) - first, 0)
            free = jnp.minimum(lax.div(prefix + base + 1, i32(block)), own)
            if window:
                free = i32(0)
            mine = None if staging is None else staging.at[warpgroup]

            def step(i, carry, *, masked):
                top, total, acc = carry
                slot = lax.rem(i, i32(stages))
                first_token = (first + i) * block
                plgpu.barrier_wait(k_full.at[slot])
                scores = scores_of(q_tile, k_tiles.at[slot], ROWS, block) * (scale * LOG2E)
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    iota = functools.partial(
                        plgpu.broadcasted_iota, jnp.int32, (ROWS, block), layout=WGMMA
                    )
                    key, query = first_token + iota(1), prefix + base + iota(0)
                    seen = key <= query
                    if window:
                        seen &= key > query - window
                    scores = jnp.where(seen, scores, NEG)
                new_top = jnp.maximum(top, scores.max(axis=1))
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - spread(new_top, scores.shape))
                total = total * shrink + weights.sum(axis=1)
                acc = acc * spread(shrink, acc.shape)
                plgpu.barrier_wait(v_full.at[slot])
                if masked:
                    zero_outside(v_tiles.at[slot], first_token, lowest, sequence_end)
                acc = add_values(acc, weights.astype(dtype), v_tiles.at[slot], mine)
                plgpu.barrier_arrive(v_free.at[slot])
                return new_top, total, acc

            carry = start_softmax(ROWS, head_dim)
            carry = lax.fori_loop(0, free, functools.partial(step, masked=False), carry)
            _, total, acc = lax.fori_loop(free, own, functools.partial(step, masked=True), carry)

            @pl.loop(own, blocks)
            def _(i):  # tiles that only the other warpgroup needs
                slot = lax.rem(i, i32(stages))
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])

            acc = acc / spread(jnp.maximum(total, TINY), acc.shape)
            q_tile[...] = acc.astype(dtype)
            plgpu.commit_smem()
            for piece in range(0, ROWS, 8):

                @pl.when(base + piece < count)
                def _(piece=piece):
                    out_rows = pl.ds(pl.multiple_of(row0 + base + piece, 8), 8)
                    plgpu.copy_smem_to_gmem(q_tile.at[pl.ds(piece, 8)], out_ref.at[out_rows, head])

            plgpu.wait_smem_to_gmem(0)

        @pl.when((warpgroup == COMPUTE) & (blocks > 0))
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def issue(i, slot):
                at = (first + i) * pages
                ids = [table_ref[known, jnp.minimum(at + j, last_page)] for j in range(pages)]
                issue_pages(
                    ids, kv_head, slot, page_size,
                    (k_ref, v_ref), (k_tiles, v_tiles), (k_full, v_full),
                )  # fmt: skip

            load_ring(issue, blocks, stages, k_free, v_free)

    sequence, offset = plan_tiles(q_lens, tokens, ROWS * COMPUTE)
    scratch: list[Any] = [
        plgpu.SMEM((COMPUTE, ROWS, head_dim), dtype, transforms=TRANSFORMS),
        *ring(stages, block, head_dim, dtype, pages, readers=COMPUTE),
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
        grid=(heads, sequence.shape[0]),
        grid_names=("head", "tile"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(q, k_pages, v_pages, page_table, q_starts, q_lens, prefix_lens, sequence, offset)
