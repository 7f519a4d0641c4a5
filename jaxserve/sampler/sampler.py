"""Logits to tokens, every parameter per row. Neutral values make any mix of rows one program."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.sampler import logprobs as lp
from jaxserve.sampler.filters import keep_mask
from jaxserve.sampler.noise import gumbel_noise
from jaxserve.sampler.processors import apply_bias, apply_penalties, clean
from jaxserve.step.state import RowParams, Sampled, SparseRows


class SamplerOptions(NamedTuple):
    """Fixed when the engine starts. top: columns of the best-logprobs output. raw_logprobs: report
    logprobs before temperature instead of after (upstream's SGLANG_RETURN_ORIGINAL_LOGPROB)."""

    top: int
    raw_logprobs: bool


def sample_greedy(
    logits: jax.Array, sampled: Sampled, rows: jax.Array
) -> tuple[Sampled, jax.Array]:
    """The program for batches in which no row wants anything but argmax.

    logits [B, V] float32, rows [B] int32 slots (R for padding). Returns the updated carry and the
    tokens [B] int32. Equal to what `sample` gives for such rows.
    """
    tokens = jnp.argmax(clean(logits), axis=-1).astype(jnp.int32)
    return _remember(sampled, rows, tokens), tokens


def sample(
    logits: jax.Array, sampled: Sampled, rows: jax.Array, lengths: jax.Array, params: RowParams,
    sparse: SparseRows, options: SamplerOptions,
) -> tuple[Sampled, jax.Array, lp.TokenLogprobs]:  # fmt: skip
    """Apply penalties, biases, temperature and filters, draw a token, report logprobs.

    logits [B, V] float32; rows [B] int32 slots (R for padding); lengths [R+1] int32, the position
    of the token drawn now. Costly parts run only if a row of the batch needs them.
    Order as upstream (engine-api.md 2.2); greedy rows (top_k 1) take the argmax before temperature.
    """
    floats, ints = params.float_columns(rows), params.int_columns(rows)
    positions = lengths[rows]
    live = rows < lengths.shape[0] - 1
    greedy = ints["top_k"] == 1
    top_k = jnp.where(greedy, logits.shape[-1], ints["top_k"])

    penalized = live & (
        (floats["frequency"] != 0) | (floats["presence"] != 0) | (floats["repetition"] != 1)
    )
    logits = jax.lax.cond(
        jnp.any(penalized),
        lambda x: apply_penalties(
            x, sampled.counts[rows], floats["frequency"], floats["presence"], floats["repetition"]
        ),
        lambda x: x,
        logits,
    )
    biased = live & (ints["num_bias"] > 0)
    logits = jax.lax.cond(
        jnp.any(biased),
        lambda x: apply_bias(
            x,
            sparse.bias_ids[rows],
            sparse.bias_values[rows],
            jnp.where(biased[:, None], sparse.bias_until[rows], 0),
            positions,
        ),
        lambda x: x,
        logits,
    )
    logits = clean(logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.where(greedy, 1.0, floats["temperature"])[:, None]
    filtered = (
        live
        & ~greedy
        & ((top_k < logits.shape[-1]) | (floats["top_p"] < 1) | (floats["min_p"] > 0))
    )

    def draw(x: jax.Array) -> jax.Array:
        keep = jax.lax.cond(
            jnp.any(filtered),
            lambda y: keep_mask(y, top_k, floats["top_p"], floats["min_p"]),
            lambda y: jnp.ones(y.shape, bool),
            x,
        )
        seeds = jax.lax.bitcast_convert_type(ints["seed"], jnp.uint32)
        noise = gumbel_noise(seeds, ints["sample_index"], positions, x.shape[-1])
        drawn = jnp.argmax(jnp.where(keep, x + noise, -jnp.inf), axis=-1).astype(jnp.int32)
        return jnp.where(greedy, best, drawn)

    tokens = jax.lax.cond(jnp.any(live & ~greedy), draw, lambda _: best, scaled)
    wants = live & (ints["wants_logprob"] > 0)
    reported = jax.lax.cond(
        jnp.any(wants),
        lambda x: lp.token_logprobs(
            x, tokens, sparse.logprob_ids[rows], options.top, jnp.any(wants & (ints["num_top"] > 0))
        ),
        lambda x: lp.zeros(x.shape[0], options.top, sparse.logprob_ids.shape[1]),
        logits if options.raw_logprobs else scaled,
    )
    return _remember(sampled, rows, tokens), tokens, reported


def _remember(sampled: Sampled, rows: jax.Array, tokens: jax.Array) -> Sampled:
    """Carry the tokens to the next step, and count them for penalties."""
    return Sampled(sampled.last_tokens.at[rows].set(tokens), sampled.counts.at[rows, tokens].add(1))
