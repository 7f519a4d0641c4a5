"""Paged decode attention for few rows on Hopper, Pallas on the Mosaic GPU backend: a row's splits
merge inside a thread-block cluster.

Grid (B, K) x cluster (splits): one block of one warpgroup holds one KV head and every splits-th
tile of one row. With few rows the time is a chain of latencies, kept this short:

    1  length, page ids of the first `stages` tiles, first page: independent loads, all in flight
       (tiles are dealt in turn, so which pages are mine does not depend on the length)
    2  all of those tiles by TMA at once; q by the threads meanwhile
    3  wgmma, softmax, wgmma for each tile as it lands
    4  sums of each head-dim slice to the block that merges that slice, which waits for the bytes
    5  its slice of the output to memory

Nothing passes through global memory between 2 and 5: no partial results, lock, fence or second
launch. There is no loader warpgroup: with the tiles in flight from the start there is little left
to hand over, and longer rows refill a slot once it is read, `stages` tiles ahead.

Every block of a cluster takes part in the exchange, with or without tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.cluster_ops import (
    await_blocks,
    exchange_scratch,
    load_queries,
    merge_shares,
    send_shares,
    start_exchange,
)
from pallas_kernels.device import Device, current_device
from pallas_kernels.mosaic_ops import (
    TRANSFORMS,
    TRANSFORMS_F32,
    attend_tile,
    ceil_div,
    check_case,
    i32,
    issue_pages,
    plgpu,
    ring,
    start_softmax,
)
from pallas_kernels.paged_decode.splits import HOPPER_CORES, choose_splits, most_in_cluster
from pallas_kernels.paged_features import paged_features
from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.tuning import tuned

ROWS = 64
MAX_GROUP = 8
MIN_CLUSTER = 2
"""Where the rows leave multiprocessors for fewer blocks than this, other kernels stay."""
RING_BYTES = 92 << 10
"""Two blocks fit a multiprocessor's 227 KiB, with up to 21 for queries and exchange each: else a
cluster of 16 takes 16 multiprocessors of one GPC, which some GPCs do not have."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block: tokens a tile, a multiple of the page size. stages: tiles in flight. splits: blocks of
    a cluster (2, 4, 8 or 16); 0 chooses, 1 leaves the case to other kernels."""

    block: int = 64
    stages: int = 2
    splits: int = 0


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any; a tile holds at least one page."""
    sizes = dataclasses.replace(
        Sizes(), **tuned(device, "paged_decode", "mosaic_cluster", features)
    )
    block = max(sizes.block, min(features["page_size"], 128))
    fit = RING_BYTES // (2 * block * features["head_dim"] * features["itemsize"])
    return dataclasses.replace(sizes, block=block, stages=min(sizes.stages, fit))


def plan(q: Any, k_pages: Any, page_table: Any, sizes: Sizes | None = None) -> Sizes:
    """Sizes with the splits chosen, for arrays or their specs. Raises NotImplementedError for what
    the kernel cannot do, or leaves to others."""
    batch, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    device = current_device()
    if sizes is None:
        features = {"batch": batch, **paged_features(q, k_pages)}
        sizes = default_sizes(device, features)
    check_case(q.dtype, k_pages.dtype, page_size, head_dim, sizes.block)
    if group > MAX_GROUP:
        raise NotImplementedError(f"{group} query heads a KV head are more than {MAX_GROUP}")
    tiles_at_most = pl.cdiv(page_table.shape[1] * page_size, sizes.block)
    programs, cores = batch * kv_heads, device.cores or HOPPER_CORES
    # at most one block a multiprocessor, where choose_splits reckons with two
    splits = sizes.splits or choose_splits(
        2 * programs, min(tiles_at_most, most_in_cluster(head_dim)), cores
    )
    if splits < MIN_CLUSTER:
        raise NotImplementedError(
            f"{programs} programs of at most {tiles_at_most} tiles are better left whole"
        )
    if not sizes.splits and programs * splits < cores // 4:
        raise NotImplementedError(
            f"{programs} clusters of {splits} blocks leave most of {cores} multiprocessors idle, "
            "too long in long contexts"
        )
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
    interpret: Any = None,
) -> Any:
    """See pallas_kernels.paged_decode. interpret: compat.mosaic_interpreter() to run on a CPU; the
    shares are then merged by XLA, since the interpreter has no stores to other blocks."""
    batch, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    dtype = q.dtype
    sizes = plan(q, k_pages, page_table, sizes)
    block, splits = sizes.block, sizes.splits
    width, pages = page_table.shape[1], block // page_size
    # what one block may have to read; a ring of more would stay empty
    most = pl.cdiv(pl.cdiv(width * page_size, block), splits)
    stages = min(sizes.stages, most)
    exchange = {"blocks": splits, "group": group, "head_dim": head_dim}

    def body(q_ref, k_ref, v_ref, table_ref, length_ref, first_page_ref, *refs):
        if interpret is None:
            out_ref, q_tile, k_tiles, v_tiles, k_full, v_full, box, sums, barrier = refs
            staging = None
        else:
            (
                acc_ref, top_ref, total_ref, q_tile, k_tiles, v_tiles, k_full, v_full,
                acc_tile, top_tile, total_tile, q_full, staging,
            ) = refs  # fmt: skip
        b, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        lowest = jnp.maximum(length_ref[b] - window, 0) if window else i32(0)
        first = lax.div(lowest, i32(block))

        def page_ids(i):
            """Of my i-th tile, as the table has them, whether the row is that long or not."""
            at = (first + split + i * splits) * pages
            return tuple(table_ref[b, jnp.minimum(at + j, width - 1)] for j in range(pages))

        at_first_page = first_page_ref[0]
        ids = [page_ids(i32(i)) for i in range(stages + (most > stages))]
        if interpret is None:
            start_exchange(barrier, **exchange)
        # asked for last, since first waited for; loads do not pass the exchange's start
        length = length_ref[b]
        last = ceil_div(length, block)
        tiles = lax.div(jnp.maximum(last - first - split, 0) + (splits - 1), i32(splits))
        last_page = ceil_div(length, page_size) - 1

        def issue(i, slot, ids):
            at = (first + split + i * splits) * pages
            # of pages past the row's last one, take the tile's first again: its tokens are masked
            ids = [
                jnp.where(at + j <= last_page, page, ids[0]) + at_first_page
                for j, page in enumerate(ids)
            ]
            issue_pages(ids, head, slot, page_size, k_ref, k_tiles, k_full)
            issue_pages(ids, head, slot, page_size, v_ref, v_tiles, v_full)

        for slot in range(stages):
            pl.when(slot < tiles)(functools.partial(issue, i32(slot), slot, ids[slot]))
        if interpret is None:
            load_queries(
                q_ref.at[b, head], q_tile, group=group, head_dim=head_dim, transforms=TRANSFORMS
            )
            plgpu.commit_smem()
            await_blocks()
        else:
            plgpu.copy_gmem_to_smem(q_ref.at[b, head], q_tile.at[pl.ds(0, MAX_GROUP)], q_full.at[0])
            plgpu.barrier_wait(q_full.at[0])

        def step(i, carry):
            softmax, following = carry
            slot = lax.rem(i, i32(stages))
            softmax = attend_tile(
                softmax, q_tile, k_tiles.at[slot], v_tiles.at[slot], k_full.at[slot],
                v_full.at[slot], (first + split + i * splits) * block, lowest, length, scale=scale,
                window=window, soft_cap=soft_cap, staging=staging,
            )  # fmt: skip
            if most > stages:

                @pl.when(i + stages < tiles)
                def _():
                    plgpu.commit_smem()  # all four warps have read the slot
                    issue(i + stages, slot, following)

                following = page_ids(i + stages + 1)
            return softmax, following

        following = ids[stages] if most > stages else ()
        start = start_softmax(ROWS, head_dim)
        (top, total, acc), _ = lax.fori_loop(0, tiles, step, (start, following))
        if interpret is None:
            send_shares(acc, top, total, box, sums, barrier, **exchange)
            merge_shares(box, sums, barrier, out_ref.at[b, head], dtype=dtype, **exchange)
            return
        acc_tile[...] = acc
        top_tile[...] = top
        total_tile[...] = total
        plgpu.commit_smem()
        rows = pl.ds(0, MAX_GROUP)
        plgpu.copy_smem_to_gmem(acc_tile.at[rows], acc_ref.at[split, b, head])
        plgpu.copy_smem_to_gmem(top_tile.at[rows], top_ref.at[split, b, head])
        plgpu.copy_smem_to_gmem(total_tile.at[rows], total_ref.at[split, b, head])
        plgpu.wait_smem_to_gmem(0)

    if first_page is None:
        first_page = jnp.zeros(1, jnp.int32)
    grouped = q.reshape(batch, kv_heads, group, head_dim)
    scratch: list[Any] = [
        plgpu.SMEM((ROWS, head_dim), dtype, transforms=TRANSFORMS),
        *ring(stages, block, head_dim, dtype, pages),
    ]
    options: dict[str, Any] = {}
    if interpret is None:
        out_type = jax.ShapeDtypeStruct(grouped.shape, dtype)
        scratch += exchange_scratch(splits, head_dim)
    else:
        shape = (splits, batch, kv_heads, MAX_GROUP)
        row = jax.ShapeDtypeStruct(shape, jnp.float32)
        out_type = [jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32), row, row]
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, MAX_GROUP - group), (0, 0)))
        scratch += [
            plgpu.SMEM((ROWS, head_dim), jnp.float32, transforms=TRANSFORMS_F32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=1),
            plgpu.SMEM((ROWS, block), dtype, transforms=TRANSFORMS),
        ]
        options["interpret"] = interpret
    out = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(batch, kv_heads),
        grid_names=("row", "head"),
        cluster=(splits,),
        cluster_names=("split",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(grouped, k_pages, v_pages, page_table, lengths, first_page)
    if interpret is not None:
        out = merge(*out)[:, :, :group]
    out = out.reshape(q.shape).astype(dtype)
    return out if locks is None else (out, locks)


def merge(acc: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """What `merge_shares` computes: acc [splits, B, K, G, H], top and total [splits, B, K, G], of
    splits without tiles (0, NEG, 0), -> [B, K, G, H]."""
    weights = jnp.exp2(top - jnp.maximum(top.max(axis=0), NEG))
    total = jnp.maximum((weights * total).sum(axis=0), TINY)
    return (weights[..., None] * acc).sum(axis=0) / total[..., None]
