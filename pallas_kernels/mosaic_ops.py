"""Pieces of the Mosaic GPU kernels for Hopper: one ring of key and value tiles, filled by TMA.

    loader warpgroup    page_table -> one TMA a page -> K tile, V tile of the ring   (full barriers)
    compute warpgroups  wait full -> wgmma -> arrive free                            (free barriers)

Tiles are [block, H] in shared memory, tiled (8, 64) and swizzled by 128 bytes, as wgmma wants;
where 64 does not divide H, (8, 32) and by 64 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.softmax import LOG2E, NEG

plgpu = compat.mosaic_backend()

TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
TRANSFORMS_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
WGMMA = plgpu.Layout.WGMMA


def transforms(columns: int) -> tuple[Any, ...]:
    """How a tile of 16-bit numbers lies in shared memory."""
    if columns % 64 == 0:
        return TRANSFORMS
    return plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64)


def check_case(
    dtype: Any,
    pages_dtype: Any,
    page_size: int,
    head_dim: int,
    block: int,
    head_dims: tuple[int, ...] = (64, 128),
) -> None:
    """What the kernels cannot do, as NotImplementedError. head_dims: that the kernel takes."""
    if pages_dtype != dtype:
        raise NotImplementedError(
            f"pages of {jnp.dtype(pages_dtype).name} with q of {jnp.dtype(dtype).name}: TMA brings "
            "the tiles to wgmma as they are stored"
        )
    if jnp.dtype(dtype).itemsize != 2:
        raise NotImplementedError(f"dtype {jnp.dtype(dtype).name}: wgmma takes 16-bit operands")
    if head_dim not in head_dims:
        raise NotImplementedError(
            f"head dim {head_dim} is none of {', '.join(map(str, head_dims))}"
        )
    if page_size % 8 or block % page_size:
        raise NotImplementedError(
            f"page size {page_size} is no multiple of 8 that divides a tile of {block} tokens"
        )


def i32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def ceil_div(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x + (n - 1), i32(n))


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[m] -> [m, n]."""
    return lax.broadcast_in_dim(x, shape, [0])


def start_softmax(rows: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Running maximum, sum and output of no keys yet, in the layout of wgmma's results."""
    cast = plgpu.layout_cast
    return (
        cast(jnp.full((rows,), NEG, jnp.float32), WGMMA.reduce(1)),
        cast(jnp.full((rows,), 0.0, jnp.float32), WGMMA.reduce(1)),
        cast(jnp.full((rows, width), 0.0, jnp.float32), WGMMA),
    )


def scores_of(
    q_tile: Any, k_tile: Any, rows: int, block: int, issued: Callable[[], None] = lambda: None
) -> jax.Array:
    """q_tile [rows, H] x k_tile [block, H] -> [rows, block] float32; both in shared memory. issued
    is called when the product is queued, before it is waited for."""

    def product(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, q_tile, k_tile.transpose((1, 0)))
        issued()
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC((rows, block), jnp.float32))


def add_values(acc: jax.Array, weights: jax.Array, v_tile: Any, staging: Any) -> jax.Array:
    """acc [rows, H] + weights [rows, block] x v_tile [block, H].

    staging: None on the device, where the weights stay in registers; the interpreter knows neither
    register operands nor an initialised accumulator, and takes a buffer for the weights.
    """
    if staging is None:

        def accumulate(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, weights, v_tile)

        return pl.run_state(accumulate)(plgpu.ACC.init(acc))
    staging[...] = weights
    plgpu.commit_smem()

    def product(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, staging, v_tile)
        return acc_ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def weigh(
    scores: jax.Array, top: jax.Array, total: jax.Array, *,
    scale: float, soft_cap: float | None, seen: jax.Array | None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """One step of the online softmax: (weights, new top, new total, shrink of what was summed).

    scores [m, n]: products of queries and keys. seen [m, n]: None when every key is. A row that saw
    nothing yet weighs 1 a key; its first seen key shrinks that to 0.
    """
    factor = scale * LOG2E
    if soft_cap is not None:
        scores, factor = jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2E), 1.0
    elif seen is not None or factor <= 0:  # a fused NEG * factor - top would be rounding errors
        scores, factor = scores * factor, 1.0
    if seen is not None:
        scores = jnp.where(seen, scores, NEG)
    highest = scores.max(axis=1)
    if factor != 1.0:  # the factor is part of a fused multiply-add below
        highest, scores = highest * factor, scores * factor
    new_top = jnp.maximum(top, highest)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - spread(new_top, scores.shape))
    return weights, new_top, total * shrink + weights.sum(axis=1), shrink


def zero_outside(v_tile: Any, first_token: jax.Array, low: Any, high: Any) -> None:
    """Zero the rows of v_tile [block, H] whose token (first_token + row) is not in [low, high).

    Slots that were never written may hold NaN; their weight is 0, and 0 * NaN is NaN. Only a row's
    last tile (and a window's first) needs it, so the pass through registers is rare. Warpgroups
    that share the tile write the same bytes.
    """
    block = v_tile.shape[0]

    @pl.when((first_token < low) | (first_token + block > high))
    def _():
        values = plgpu.layout_cast(v_tile[...], WGMMA)
        token = first_token + plgpu.broadcasted_iota(jnp.int32, v_tile.shape, 0, layout=WGMMA)
        live = (token >= low) & (token < high)
        v_tile[...] = jnp.where(live, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def attend_tile(
    carry: tuple[jax.Array, jax.Array, jax.Array], q_tile: Any, k_tile: Any, v_tile: Any,
    k_full: Any, v_full: Any, first_token: jax.Array, lowest: Any, length: jax.Array, *,
    scale: float, window: int | None, soft_cap: float | None, staging: Any,
    keys_read: Callable[[], None] = lambda: None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """One row's queries over a tile of its tokens: (top, total, acc) of `start_softmax` and after.

    q_tile [m, H]; k_tile, v_tile [block, H] with their barriers. The tile's tokens count from
    first_token; those in [lowest, length) are seen, lowest with a window only. keys_read is called
    when k_tile is no longer needed.
    """
    top, total, acc = carry
    rows, block = q_tile.shape[0], k_tile.shape[0]
    plgpu.barrier_wait(k_full)
    scores = scores_of(q_tile, k_tile, rows, block)
    keys_read()
    token = first_token + plgpu.broadcasted_iota(jnp.int32, (rows, block), 1, layout=WGMMA)
    live = token < length
    if window:
        live &= token >= lowest
    weights, top, total, shrink = weigh(
        scores, top, total, scale=scale, soft_cap=soft_cap, seen=live
    )
    acc = acc * spread(shrink, acc.shape)
    plgpu.barrier_wait(v_full)
    zero_outside(v_tile, first_token, lowest, length)
    return top, total, add_values(acc, weights.astype(q_tile.dtype), v_tile, staging)


def ring(
    stages: int, block: int, head_dim: int, dtype: Any, pages: int, readers: int = 0
) -> list[Any]:
    """Scratch of the ring: K and V tiles, then the barriers K full, V full and, where a loader
    waits for `readers`, K free, V free."""
    tile = plgpu.SMEM((stages, block, head_dim), dtype, transforms=transforms(head_dim))
    barriers = [
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        for arrivals in (pages, pages, readers, readers)
        if arrivals
    ]
    return [tile, tile, *barriers]


def load_ring(
    issue: Callable[[jax.Array, Any], None], tiles: jax.Array, stages: int, k_free: Any, v_free: Any
) -> None:
    """The loader's loop: issue(tile, slot) for each of `tiles`, `stages` ahead of the readers."""
    for slot in range(stages):
        pl.when(slot < tiles)(functools.partial(issue, i32(slot), slot))

    def wait(i: jax.Array) -> jax.Array:
        slot = lax.rem(i, i32(stages))
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])
        return slot

    @pl.loop(0, jnp.maximum(tiles - stages, 0))
    def _(i):
        issue(i + stages, wait(i))

    # every phase of a barrier is observed before it dies: the interpreter insists on it
    @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
    def _(i):
        wait(i)


def issue_pages(
    page_ids: list[jax.Array], head: jax.Array, slot: Any, page_size: int,
    source: Any, tiles: Any, barriers: Any,
) -> None:  # fmt: skip
    """One TMA a page: source [P, S, K, H] -> tiles[slot]."""
    for j, page in enumerate(page_ids):
        target = tiles.at[slot, pl.ds(j * page_size, page_size)]
        plgpu.copy_gmem_to_smem(source.at[page, :, head], target, barriers.at[slot])
