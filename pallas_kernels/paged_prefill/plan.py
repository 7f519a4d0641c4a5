"""Which tile of query rows a program of the prefill kernels works on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FIXED_TILE = 128
"""With fixed_tiles, tiles hold a number of tokens that divides this."""


def plan_tiles(q_lens: jax.Array, total: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """(sequence [n], offset [n]) of n = ceil(T / tile) + B tiles; sequence -1 for tiles unused.

    Tiles of a sequence are in order, sequences too; offset counts from the sequence's first new
    token. total = T bounds the sum of q_lens [B], tile is the query tokens a tile holds. All layers
    of a step compute the same plan, which XLA does once.
    """
    rows = q_lens.shape[0]
    count = -(-total // tile) + rows
    tiles = (q_lens + (tile - 1)) // tile
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    number = jnp.arange(count, dtype=jnp.int32)
    # compare_all: one small fusion, where the default search is a loop of launches
    sequence = jnp.searchsorted(ends, number, side="right", method="compare_all")
    sequence = sequence.astype(jnp.int32)
    used = sequence < rows
    known = jnp.minimum(sequence, rows - 1)
    offset = (number - (ends[known] - tiles[known])) * tile
    return jnp.where(used, known, -1), jnp.where(used, offset, 0)


def plan_work(
    q_starts: jax.Array, q_lens: jax.Array, prefix_lens: jax.Array, total: int, *,
    tile: int, block: int, window: int | None, reach: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(work [n, 4 or 6], used [1]): the tiles of plan_tiles, most blocks of keys first.

    A row is (packed row of the tile's first token, tokens from there to the sequence's end, that
    token's position, sequence), and with reach [T] the least and the greatest of its tokens; the
    first `used` rows are tiles, the rest is unspecified. Programs that take the heavy tiles first
    end together, since the light ones fill the gaps.
    """
    sequence, offset = plan_tiles(q_lens, total, tile)
    known = jnp.maximum(sequence, 0)
    left, position = q_lens[known] - offset, prefix_lens[known] + offset
    lowest = jnp.maximum(position - (window - 1), 0) if window else jnp.zeros_like(position)
    end = position + jnp.minimum(left, tile)
    bounds = ()
    if reach is not None:
        limits = tile_reach(reach, q_starts[known] + offset, left, tile)
        bounds = limits.min(axis=1), limits.max(axis=1)
        end = bounds[1] + 1
    blocks = (end + (block - 1)) // block - lowest // block
    order = jnp.argsort(jnp.where(sequence >= 0, -blocks, 1), stable=True)
    work = jnp.stack([q_starts[known] + offset, left, position, known, *bounds], axis=1)
    return work[order], jnp.sum(sequence >= 0, dtype=jnp.int32)[None]


def tile_reach(reach: jax.Array, first_row: jax.Array, left: jax.Array, tile: int) -> jax.Array:
    """[n, tile]: reach [T] of the tokens of tiles, see plan_work; behind a sequence's end that of
    its last token."""
    token = jnp.clip(jnp.arange(tile, dtype=jnp.int32), 0, jnp.maximum(left, 1)[:, None] - 1)
    return reach[jnp.minimum(first_row[:, None] + token, reach.shape[0] - 1)]
