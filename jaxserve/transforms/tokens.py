"""Tokens and sequences of tokens that a request names."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import checks
from jaxserve.transforms.context import Context
from jaxserve.transforms.selection import nonempty
from jaxserve.transforms.transform import Params, State, Transform

NONE = -1
"""Fills lists up to their fixed length."""
LARGEST_FACTOR = 1e30
"""Keeps products with logits finite."""


def bad_words(count: int = 16, length: int = 8) -> Transform:
    """Sequences that never come, as Hugging Face's `NoBadWordsLogitsProcessor`: the last token of
    one is banned where the text ends with those before it. Where every token would be banned, none
    is. End tokens are banned like others.

    `bad_words` ([count, length] int32 of -1): the sequences' ids from the left, then -1.
    """
    checks.integer("count", count, 1)
    checks.integer("length", length, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        last, due = _due(params["bad_words"], context)
        ids = jnp.where(due, last, logits.shape[0])
        return nonempty(logits.at[ids].set(-jnp.inf, mode="drop"), logits)

    none = np.full((count, length), NONE, np.int32)
    return Transform(apply, params={"bad_words": none}, ranges={"bad_words": (NONE, None)})


def sequence_bias(count: int = 16, length: int = 8) -> Transform:
    """Hugging Face's `SequenceBiasLogitsProcessor`: the last token of a sequence has a bias where
    the text ends with those before it; several of one token are summed. Where biases of -inf would
    leave no token, there are none.

    `bias_sequences` ([count, length] int32 of -1): the sequences' ids from the left, then -1.
    `bias_values` ([count] float32 of 0.0): finite, or -inf.
    """
    checks.integer("count", count, 1)
    checks.integer("length", length, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        last, due = _due(params["bias_sequences"], context)
        values = params["bias_values"]
        # each entry has its token's whole sum: entries of one token write the same, in any order
        sums = jnp.where((last == last[:, None]) & due, values, 0.0).sum(axis=1)
        ids = jnp.where(due & (sums != 0), last, logits.shape[0])
        return nonempty(logits.at[ids].set(logits[last] + sums, mode="drop"), logits)

    sequences, values = np.full((count, length), NONE, np.int32), np.zeros(count, np.float32)
    return Transform(
        apply,
        params={"bias_sequences": sequences, "bias_values": values},
        ranges={"bias_sequences": (NONE, None)},
    )


def forced_tokens(count: int = 16) -> Transform:
    """The first outputs, or some of them, are given, as by Hugging Face's
    `ForcedBOSTokenLogitsProcessor` and `ForcedEOSTokenLogitsProcessor`: all other tokens are -inf,
    and the logit of this one is 0.

    `forced_tokens` ([count] int32 of -1): the id of each output; where it is -1 the token is free,
    as it is after them, and where the vocabulary has no such id.
    """
    checks.integer("count", count, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        tokens = params["forced_tokens"]
        ids = jnp.arange(logits.shape[0])
        token = jnp.where(context.step < count, tokens[jnp.minimum(context.step, count - 1)], NONE)
        forced = (token >= 0) & (token < logits.shape[0])
        return jnp.where(forced, jnp.where(ids == token, 0.0, -jnp.inf), logits)

    none = np.full(count, NONE, np.int32)
    return Transform(apply, params={"forced_tokens": none}, ranges={"forced_tokens": (NONE, None)})


def exponential_decay_length(end_tokens: Sequence[int]) -> Transform:
    """Hugging Face's `ExponentialDecayLengthPenalty`: after some outputs each of `end_tokens` gains
    |logit| * (factor ** (outputs beyond) - 1). One that is -inf stays so.

    `decay_start` (0): outputs before it begins. `decay_factor` (1.0): 1 changes nothing.
    """
    ends = np.array([checks.integer("end_tokens", token, 0) for token in end_tokens], np.int32)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        beyond = context.step - params["decay_start"]
        factor = jnp.minimum(params["decay_factor"] ** beyond.astype(jnp.float32), LARGEST_FACTOR)
        before = logits[ends]
        active = (beyond > 0) & (factor != 1) & jnp.isfinite(before)
        after = before + jnp.abs(before) * (factor - 1)
        return logits.at[ends].set(jnp.where(active, after, before))

    return Transform(
        apply,
        params={"decay_start": np.int32(0), "decay_factor": 1.0},
        ranges={"decay_start": (0, None), "decay_factor": (0, None)},
    )


def _due(sequences: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """The last token of each of `sequences` [C, L], and whether the text ends with those before it:
    [C] int32 and [C] bool."""
    most = sequences.shape[1]
    text, there = context.history(max(most - 1, 1))
    text = jnp.where(there, text, NONE)
    lengths = (sequences >= 0).sum(axis=1)
    last = jnp.take_along_axis(sequences, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    at = jnp.arange(most - 1)
    ahead = at < lengths[:, None] - 1
    # of a sequence of l tokens, the first is compared with the (l - 1)th before the end
    compared = text[jnp.clip(text.shape[0] - (lengths[:, None] - 1) + at, 0, text.shape[0] - 1)]
    return last, (lengths > 0) & ((compared == sequences[:, :-1]) | ~ahead).all(axis=1)
