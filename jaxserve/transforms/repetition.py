"""Against repetition: what would go on as the text went on before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import checks
from jaxserve.transforms.context import Context
from jaxserve.transforms.selection import nonempty
from jaxserve.transforms.transform import Params, State, Transform

LARGEST_PENALTY = 1e30
"""Of a logit: as good as -inf, but finite."""
NONE = -1
"""In place of a token that is not there."""


def no_repeat_ngram(window: int = 1024, longest: int = 32) -> Transform:
    """No n tokens in a row come twice (Paulus et al. 2017, "A Deep Reinforced Model for Abstractive
    Summarization"), prompt included, as Hugging Face's `NoRepeatNGramLogitsProcessor`. It looks at
    the last `window` tokens. Where every token would be banned, none is.

    `no_repeat_ngram_size` (0): n, at most `longest`, more counts as that; 0 bans nothing.
    """
    checks.integer("window", window, 2)
    checks.integer("longest", longest, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        text = _text(context, window)
        size = params["no_repeat_ngram_size"]
        wanted = jnp.minimum(size, longest) - 1
        banned = (_match_lengths(text, text, longest) >= wanted) & (text != NONE) & (size > 0)
        return nonempty(_lower(logits, text, jnp.where(banned, -jnp.inf, jnp.inf)), logits)

    ranges = {"no_repeat_ngram_size": (0, longest)}
    return Transform(apply, params={"no_repeat_ngram_size": np.int32(0)}, ranges=ranges)


def dry(window: int = 1024, longest: int = 64, breakers: int = 16) -> Transform:
    """Don't Repeat Yourself (p-e-w 2024, text-generation-webui's pull request 5677): a token that
    would go on a repetition of n tokens loses multiplier * base ** (n - allowed length), n being
    the longest of all that it would go on. It looks at the last `window` tokens of prompt and
    outputs. A match ends at a breaker, and counts `longest` tokens at most; breakers themselves
    lose nothing.

    `dry_multiplier` (0.0): 0 is off. `dry_base` (1.75): at least 1. `dry_allowed_length` (2): the
    longest repetition without a penalty is one token shorter. `dry_breakers` ([breakers] of -1):
    token ids, for a string those of all tokens that have it in them; -1 is none.
    """
    checks.integer("window", window, 2)
    checks.integer("longest", longest, 1)
    checks.integer("breakers", breakers, 1)

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        text = _text(context, window)
        breaks = (text[:, None] == params["dry_breakers"]).any(axis=1)
        lengths = _match_lengths(text, jnp.where(breaks, NONE, text), longest)
        excess = lengths - params["dry_allowed_length"]
        growth = jnp.minimum(params["dry_base"] ** excess.astype(jnp.float32), LARGEST_PENALTY)
        penalty = jnp.minimum(params["dry_multiplier"] * growth, LARGEST_PENALTY)
        hit = (lengths > 0) & (excess >= 0) & (text != NONE) & ~breaks
        return _lower(logits, text, jnp.where(hit, logits[text] - penalty, jnp.inf))

    none = np.full(breakers, NONE, np.int32)
    defaults = {"dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": np.int32(2)}
    ranges = {
        "dry_multiplier": (0, None),
        "dry_base": (1, None),
        "dry_allowed_length": (0, None),
        "dry_breakers": (NONE, None),
    }
    return Transform(apply, params={**defaults, "dry_breakers": none}, ranges=ranges)


def _text(context: Context, window: int) -> jax.Array:
    """The last tokens, the newest last, and NONE in front of a short text: [window] int32."""
    tokens, there = context.history(window)
    return jnp.where(there, tokens, NONE)


def _match_lengths(text: jax.Array, end: jax.Array, longest: int) -> jax.Array:
    """How many tokens before each of `text` [W] are those that `end` [W] ends with: [W] int32, at
    most `longest`. NONE equals nothing. No loop: all pairs are compared, and the first that differs
    is found."""
    size = text.shape[0]
    padded = jnp.concatenate([jnp.full(longest, NONE), text])
    back = jnp.arange(1, longest + 1)[:, None]
    before = padded[longest + jnp.arange(size) - back]
    wanted = jnp.concatenate([jnp.full(longest, NONE), end])[longest + size - back]
    differs = (before != wanted) | (wanted == NONE)
    return jnp.where(differs, back - 1, longest).min(axis=0)


def _lower(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """The least of a token's logit and its `values` [W]; those of ids that are NONE are inf."""
    return logits.at[jnp.maximum(ids, 0)].min(values)
