"""Penalties and biases in plain XLA: the part of sampling that comes before everything else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample.api import SampleRows, SlotLists


def adjust(logits: jax.Array, rows: SampleRows, slots: SlotLists) -> jax.Array:
    """logits [B, V] float32 after the rows' penalties and biases, which are costly and run only if
    a row of the batch has any."""
    live = rows.live != 0
    penalized = live & ((rows.frequency != 0) | (rows.presence != 0) | (rows.repetition != 1))
    biased = live & (rows.num_bias > 0)

    def penalize(x: jax.Array) -> jax.Array:
        lowered = apply_penalties(x, slots.counts[rows.slot], rows)
        return jnp.where(penalized[:, None], lowered, x)

    logits = lax.cond(jnp.any(penalized), penalize, lambda x: x, logits)
    return lax.cond(
        jnp.any(biased), lambda x: apply_bias(x, rows, slots, biased), lambda x: x, logits
    )


def apply_penalties(logits: jax.Array, counts: jax.Array, rows: SampleRows) -> jax.Array:
    """Frequency, presence, then repetition penalty of logits [B, V] with counts [B, V]."""
    seen = counts > 0
    lowered = rows.frequency[:, None] * counts.astype(jnp.float32)
    logits = logits - lowered - jnp.where(seen, rows.presence[:, None], 0.0)
    factor = jnp.where(seen, rows.repetition[:, None], 1.0)
    return jnp.where(logits < 0, logits * factor, logits / factor)


def apply_bias(
    logits: jax.Array, rows: SampleRows, slots: SlotLists, biased: jax.Array
) -> jax.Array:
    """Add the entries that are in force; biased [B] bool."""
    entry = jnp.arange(slots.bias_ids.shape[1])
    active = biased[:, None] & (entry < rows.num_bias[:, None])
    active &= rows.position[:, None] < slots.bias_until[rows.slot]
    columns = jnp.where(active, slots.bias_ids[rows.slot], logits.shape[1])
    values = jnp.where(active, slots.bias_values[rows.slot], 0.0)
    return logits.at[jnp.arange(logits.shape[0])[:, None], columns].add(values, mode="drop")
