"""What changes logits before a token is drawn, in upstream's order (engine-api.md 2.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def apply_penalties(
    logits: jax.Array, counts: jax.Array, frequency: jax.Array, presence: jax.Array,
    repetition: jax.Array,
) -> jax.Array:  # fmt: skip
    """Frequency, presence, then repetition penalty.

    logits [B, V] float32; counts [B, V] int32: how often each token was generated (the prompt does
    not count, as upstream). frequency, presence, repetition [B] float32.
    """
    seen = counts > 0
    logits = logits - frequency[:, None] * counts - jnp.where(seen, presence[:, None], 0.0)
    factor = jnp.where(seen, repetition[:, None], 1.0)
    return jnp.where(logits < 0, logits * factor, logits / factor)


def apply_bias(
    logits: jax.Array, ids: jax.Array, values: jax.Array, until: jax.Array, positions: jax.Array
) -> jax.Array:
    """Add sparse biases: logit_bias, and -inf on end tokens until min_new_tokens is reached.

    ids, until [B, C] int32, values [B, C] float32. An entry works while positions [B] < until;
    unused entries have until = 0.
    """
    active = positions[:, None] < until
    rows = jnp.arange(logits.shape[0])[:, None]
    columns = jnp.where(active, ids, logits.shape[1])
    return logits.at[rows, columns].add(jnp.where(active, values, 0.0), mode="drop")


def clean(logits: jax.Array) -> jax.Array:
    """NaN becomes the lowest value, infinities the ends of the float32 range."""
    lowest = jnp.finfo(logits.dtype).min
    return jnp.nan_to_num(logits, nan=lowest, neginf=lowest)
