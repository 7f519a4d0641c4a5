"""Sampling noise as a pure function of (seed, sample index, position).

A row's noise depends on nothing else: not on its batch mates, its slot, preemption or overlap. The
derivation is threefry2x32 key(seed), folded with the sample index, then with the absolute position
of the token being sampled; so results are reproducible by seed across batches and machines.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gumbel_noise(
    seeds: jax.Array, samples: jax.Array, positions: jax.Array, vocab_size: int
) -> jax.Array:
    """Standard Gumbel noise [B, V] float32 for rows of `seeds` [B] uint32, `samples` [B] int32,
    `positions` [B] int32. argmax(logits + noise) draws from softmax(logits) (Gumbel-max)."""

    def row(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(seeds, samples, positions)
