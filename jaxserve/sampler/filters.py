"""top-k, top-p and min-p as thresholds, without sorting the vocabulary.

The tokens kept by top-k or top-p are those whose logit is at least some value t, the largest t for
which enough tokens (or enough mass) remain. t is found exactly, two bits at a time from the top of
the float's ordered bit pattern: 16 passes of compare-and-sum over [B, V].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys that compare as the float32 values `x` do (NaN excluded; -0 equals 0)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def keep_mask(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which tokens may be drawn, [B, V] bool.

    logits [B, V] float32, already divided by the temperature. top_k [B] int32 >= 1, top_p [B] in
    (0, 1], min_p [B] in [0, 1]. top-k and top-p both look at the original distribution; min-p
    compares with its maximum. Ties at a threshold stay in.
    """
    keys = ordered_bits(logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    # top_p = 1 keeps everything: no sum of rounded masses may decide that
    wanted_mass = jnp.where(top_p < 1, top_p * jnp.sum(weights, axis=-1), 0.0)
    wanted_count = jnp.minimum(top_k, logits.shape[-1])

    def narrow(i: jax.Array, thresholds: tuple[jax.Array, jax.Array]):
        by_count, by_mass = thresholds
        shift = (30 - 2 * i).astype(jnp.uint32)
        best_count, best_mass = by_count, by_mass
        for digit in (1, 2, 3):
            step = jnp.uint32(digit) << shift
            t_count, t_mass = by_count | step, by_mass | step
            count = jnp.sum(keys >= t_count[:, None], axis=-1, dtype=jnp.int32)
            mass = jnp.sum(jnp.where(keys >= t_mass[:, None], weights, 0.0), axis=-1)
            best_count = jnp.where(count >= wanted_count, t_count, best_count)
            best_mass = jnp.where(mass >= wanted_mass, t_mass, best_mass)
        return best_count, best_mass

    start = jnp.zeros(logits.shape[0], jnp.uint32)
    by_count, by_mass = jax.lax.fori_loop(0, 16, narrow, (start, start))
    by_mass = jnp.where(top_p < 1, by_mass, 0)
    threshold = jnp.maximum(by_count, by_mass)[:, None]
    return (keys >= threshold) & (weights >= min_p[:, None])
