"""Which tile of query rows a program of the prefill kernels works on."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
