"""Paged decode attention, Pallas on the Mosaic GPU backend, for Hopper (TMA, mbarriers, wgmma).

Grid (K, splits, B): one program holds one KV head and one share of one row's tiles (as the Triton
kernel does). Two warpgroups:

    loader   page_table -> one TMA a page --> ring of `stages` tiles: K [block, H], V [block, H]
                                                      | full barriers        ^ free barriers
    compute  q [64, H] shared ----- wgmma with K ---> scores [64, block] registers
             softmax, online  ----- wgmma with V ---> acc [64, H] float32 registers
             acc, log-sum-exp --> shared --> TMA --> partial [B, splits, K, 8*ceil(G/8), H] float32

wgmma takes 64 rows; only the first ceil(G/8)*8 travel, the others compute on what shared memory
held and are dropped. XLA merges the splits. A split without tiles exits at once and writes nothing:
the merge knows from the lengths which splits have work.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.device import Device, current_device
from pallas_kernels.mosaic_ops import (
    TRANSFORMS,
    TRANSFORMS_F32,
    attend_tile,
    ceil_div,
    check_case,
    i32,
    issue_pages,
    load_ring,
    plgpu,
    ring,
    spread,
    start_softmax,
)
from pallas_kernels.paged_decode.splits import choose_splits
from pallas_kernels.paged_features import paged_features
from pallas_kernels.softmax import LOG2E, NEG, TINY
from pallas_kernels.tuning import tuned

ROWS = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block: tokens a tile, a multiple of the page size. stages: tiles in flight. splits: programs
    that share a row, a power of two; 0 chooses."""

    block: int = 64
    stages: int = 2
    splits: int = 0


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any; a tile holds at least one page."""
    sizes = dataclasses.replace(Sizes(), **tuned(device, "paged_decode", "mosaic_sm90", features))
    return dataclasses.replace(sizes, block=max(sizes.block, min(features["page_size"], 128)))


def plan(q: Any, k_pages: Any, page_table: Any, sizes: Sizes | None = None) -> Sizes:
    """Sizes with the splits chosen, for arrays or their specs. Raises NotImplementedError for what
    the kernel cannot do."""
    batch, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    device = current_device()
    if sizes is None:
        features = {"batch": batch, **paged_features(q, k_pages)}
        sizes = default_sizes(device, features)
    check_case(q.dtype, k_pages.dtype, page_size, head_dim, sizes.block)
    if heads // kv_heads > ROWS:
        raise NotImplementedError(f"{heads // kv_heads} query heads a KV head are more than {ROWS}")
    tiles_at_most = pl.cdiv(page_table.shape[1] * page_size, sizes.block)
    splits = sizes.splits or choose_splits(batch * kv_heads, tiles_at_most, device.cores)
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
    """See pallas_kernels.paged_decode. interpret: compat.mosaic_interpreter() to run on a CPU."""
    batch, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    dtype = q.dtype
    sizes = plan(q, k_pages, page_table, sizes)
    block, stages, splits = sizes.block, sizes.stages, sizes.splits
    sent = -(-group // 8) * 8  # rows that travel by TMA
    pages = block // page_size

    def shares(length: jax.Array) -> tuple[jax.Array, ...]:
        """(lowest token, first tile, last tile, tiles a split) of a row."""
        lowest = jnp.maximum(length - window, 0) if window else jnp.zeros_like(length)
        first, last = lax.div(lowest, jnp.full_like(lowest, block)), (length + (block - 1)) // block
        return lowest, first, last, (last - first + (splits - 1)) // splits

    def body(
        q_ref, k_ref, v_ref, table_ref, length_ref, first_page_ref, out_ref, lse_ref,
        q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, out_tile, lse_tile, q_full,
        staging=None,
    ):  # fmt: skip
        head, split, b = (lax.axis_index(name) for name in ("head", "split", "row"))
        warpgroup = lax.axis_index("warpgroup")
        length = length_ref[b]
        lowest = jnp.maximum(length - window, 0) if window else i32(0)
        first = lax.div(lowest, i32(block))
        last = ceil_div(length, block)
        share = ceil_div(last - first, splits)
        begin = first + split * share
        tiles = jnp.maximum(jnp.minimum(begin + share, last) - begin, 0)
        last_page = jnp.maximum(ceil_div(length, page_size) - 1, 0)

        @pl.when((warpgroup == 0) & (tiles > 0))
        def _compute():
            plgpu.copy_gmem_to_smem(q_ref.at[b, head], q_tile.at[pl.ds(0, sent)], q_full.at[0])
            plgpu.barrier_wait(q_full.at[0])

            def step(i, carry):
                slot = lax.rem(i, i32(stages))
                carry = attend_tile(
                    carry, q_tile, k_tiles.at[slot], v_tiles.at[slot], k_full.at[slot],
                    v_full.at[slot], (begin + i) * block, lowest, length, scale=scale,
                    window=window, soft_cap=soft_cap, staging=staging,
                    keys_read=lambda: plgpu.barrier_arrive(k_free.at[slot]),
                )  # fmt: skip
                plgpu.barrier_arrive(v_free.at[slot])
                return carry

            top, total, acc = lax.fori_loop(0, tiles, step, start_softmax(ROWS, head_dim))
            safe = jnp.maximum(total, TINY)
            out_tile[...] = acc / spread(safe, acc.shape)
            lse_tile[...] = top + jnp.log(safe) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, sent)], out_ref.at[b, split, head])
            plgpu.copy_smem_to_gmem(lse_tile.at[pl.ds(0, sent)], lse_ref.at[b, split, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when((warpgroup == 1) & (tiles > 0))
        def _load():
            def issue(i, slot):
                at = (begin + i) * pages
                ids = [
                    table_ref[b, jnp.minimum(at + j, last_page)] + first_page_ref[0]
                    for j in range(pages)
                ]
                issue_pages(ids, head, slot, page_size, k_ref, k_tiles, k_full)
                issue_pages(ids, head, slot, page_size, v_ref, v_tiles, v_full)

            load_ring(issue, tiles, stages, k_free, v_free)

    if first_page is None:
        first_page = jnp.zeros(1, jnp.int32)
    grouped = q.reshape(batch, kv_heads, group, head_dim)
    if sent != group:
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, sent - group), (0, 0)))
    scratch: list[Any] = [
        plgpu.SMEM((ROWS, head_dim), dtype, transforms=TRANSFORMS),
        *ring(stages, block, head_dim, dtype, pages, readers=1),
        plgpu.SMEM((ROWS, head_dim), jnp.float32, transforms=TRANSFORMS_F32),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(num_barriers=1),
    ]
    options: dict[str, Any] = {}
    if interpret is not None:
        scratch.append(plgpu.SMEM((ROWS, block), dtype, transforms=TRANSFORMS))
        options["interpret"] = interpret
    partial, lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch, splits, kv_heads, sent, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, splits, kv_heads, sent), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(kv_heads, splits, batch),
        grid_names=("head", "split", "row"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(grouped, k_pages, v_pages, page_table, lengths, first_page)
    out = _merge(partial[:, :, :, :group], lse[:, :, :, :group], *shares(lengths)[1:])
    out = out.reshape(q.shape).astype(dtype)
    return out if locks is None else (out, locks)


def _merge(
    partial: jax.Array, lse: jax.Array, first: jax.Array, last: jax.Array, share: jax.Array
) -> jax.Array:
    """partial [B, splits, K, G, H], lse [B, splits, K, G] -> [B, K, G, H], of the splits with work;
    what the others hold was never written."""
    ids = jnp.arange(lse.shape[1], dtype=jnp.int32)
    live = (first[:, None] + ids * share[:, None] < last[:, None])[:, :, None, None]
    lse = jnp.where(live, lse, NEG)
    weights = jnp.where(live, jnp.exp2(lse - lse.max(axis=1, keepdims=True)), 0.0)
    partial = jnp.where(live[..., None], partial, 0.0)
    return (partial * weights[..., None]).sum(1) / jnp.maximum(weights.sum(1), TINY)[..., None]
