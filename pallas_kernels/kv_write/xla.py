"""KV write as an XLA scatter of rows.

`unique_indices` matters: without it the GPU scatter of 4,096 rows took 87 us a layer more (H100).
Rows of padding share out-of-range slots, which are dropped before they can collide.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.device import current_device


def kv_write(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See pallas_kernels.kv_write."""
    if slots.shape[0] == 1 and current_device().platform == "cpu":
        # XLA turns a scatter of one row into a dynamic-update-slice, and its CPU fusion repeats
        # that for each reader, which copies the cache (jax 0.10.2). A second, dropped row prevents
        # it.
        outside = k_pages.shape[0] * k_pages.shape[1]
        slots = jnp.concatenate([slots, jnp.full(1, outside, slots.dtype)])
        k, v = (jnp.concatenate([x, jnp.zeros_like(x)]) for x in (k, v))

    def put(pages: jax.Array, rows: jax.Array) -> jax.Array:
        flat = pages.reshape(-1, *pages.shape[2:])
        flat = flat.at[slots].set(rows, mode="drop", unique_indices=True)
        return flat.reshape(pages.shape)

    return put(k_pages, k), put(v_pages, v)
