"""The sampler in plain XLA: the CPU engine's path, and the fallback everywhere.

    logits -> penalties -> biases -> clean -> x = scaled -> keep mask -> argmax(x + noise)
               (cond)      (cond)                          (cond)        (cond)

Costly parts run only if a row of the batch needs them. Filters are thresholds, found without a
sort: the tokens kept by top-k or top-p are those with x >= t, t being the largest value at which
enough tokens (enough mass) remain. t is found exactly, two bits at a time from the top of the
float's ordered bit pattern: 16 passes of compare-and-sum over [B, V].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample import noise
from pallas_kernels.sample.adjust import adjust
from pallas_kernels.sample.api import Drawn, SampleRows, SlotLists

LOWEST = float(jnp.finfo(jnp.float32).min)
HIGHEST = float(jnp.finfo(jnp.float32).max)


def clean(logits: jax.Array) -> jax.Array:
    """NaN becomes the lowest value, infinities the ends of the float32 range."""
    return jnp.nan_to_num(logits, nan=LOWEST, neginf=LOWEST)


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys that compare as the float32 values `x` do (NaN excluded; -0 equals 0)."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def keep_mask(x: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which tokens of scaled logits [B, V] may be drawn, bool."""
    keys = ordered_bits(x)
    largest = jnp.max(x, axis=-1, keepdims=True)
    weights = jnp.exp(x - largest)
    # top_p = 1 keeps everything: no sum of rounded masses may decide that
    wanted_mass = jnp.where(top_p < 1, top_p * jnp.sum(weights, axis=-1), 0.0)
    wanted_count = jnp.minimum(top_k, x.shape[-1])

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

    start = jnp.zeros(x.shape[0], jnp.uint32)
    by_count, by_mass = lax.fori_loop(0, 16, narrow, (start, start))
    by_mass = jnp.where(top_p < 1, by_mass, 0)
    threshold = jnp.maximum(by_count, by_mass)[:, None]
    # a top_p below float32's normal numbers is 0, and no mass is less: the largest stays anyway
    threshold = jnp.minimum(threshold, ordered_bits(largest))
    return (keys >= threshold) & (x >= largest + jnp.log(min_p)[:, None])


def sample(
    logits: jax.Array, rows: SampleRows, slots: SlotLists, *, top: int, raw_logprobs: bool,
    fixed_split: bool = False,
) -> Drawn:  # fmt: skip
    """See pallas_kernels.sample."""
    del fixed_split  # no row's sums depend on the others
    batch, vocab = logits.shape
    live = rows.live != 0
    greedy = rows.top_k == 1
    filtered = live & ~greedy & ((rows.top_k < vocab) | (rows.top_p < 1) | (rows.min_p > 0))

    logits = clean(adjust(logits, rows, slots))
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    inverse = 1.0 / jnp.where(greedy, 1.0, rows.temperature)
    scaled = jnp.clip(logits * inverse[:, None], LOWEST, HIGHEST)

    def draw(x: jax.Array) -> jax.Array:
        keep = lax.cond(
            jnp.any(filtered),
            lambda y: keep_mask(y, jnp.where(filtered, rows.top_k, vocab), rows.top_p, rows.min_p),
            lambda y: jnp.ones(y.shape, bool),
            x,
        )
        keys = noise.row_keys(rows.seed, rows.sample_index, rows.position)
        perturbed = jnp.where(keep, x + noise.gumbel_rows(*keys, vocab), -jnp.inf)
        return jnp.where(greedy, best, jnp.argmax(perturbed, axis=-1).astype(jnp.int32))

    tokens = lax.cond(jnp.any(live & ~greedy), draw, lambda _: best, scaled)
    tokens = jnp.where(live, tokens, 0)
    wants = live & (rows.wants_logprob > 0)
    wants_top = jnp.any(wants & (rows.num_top > 0))
    columns = min(top, vocab)
    named_ids = slots.named_ids[rows.slot]

    def logprobs(x: jax.Array) -> tuple[jax.Array, ...]:
        largest = jnp.max(x, axis=-1, keepdims=True)
        log_sum = jnp.log(jnp.sum(jnp.exp(x - largest), axis=-1, keepdims=True))

        def report(values: jax.Array) -> jax.Array:
            return jnp.maximum(values - largest - log_sum, LOWEST)

        def best_few() -> tuple[jax.Array, jax.Array]:
            values, ids = lax.top_k(x, columns)
            missing = ((0, 0), (0, top - columns))
            return jnp.pad(report(values), missing), jnp.pad(ids, missing)

        chosen = report(jnp.take_along_axis(x, tokens[:, None], axis=-1))[:, 0]
        few = lax.cond(wants_top, best_few, lambda: (no_values, no_ids))
        return chosen, *few, report(jnp.take_along_axis(x, named_ids, axis=-1))

    no_values, no_ids = jnp.zeros((batch, top)), jnp.zeros((batch, top), jnp.int32)
    nothing = (jnp.zeros(batch), no_values, no_ids, jnp.zeros(named_ids.shape))
    reported = lax.cond(
        jnp.any(wants), logprobs, lambda _: nothing, logits if raw_logprobs else scaled
    )
    return Drawn(tokens, *reported)
