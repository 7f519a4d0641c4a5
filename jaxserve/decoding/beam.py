"""Beam search: the likeliest continuations of a prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxserve.lab.lab import Lab

NEVER = -1e9
"""A score that no beam has."""


class Beam(NamedTuple):
    """A continuation that has ended."""

    score: float
    """The sum of its log-probabilities / its length ** length_penalty."""
    tokens: list[int]
    """Its last one is an end token, or the last that was allowed."""


class _Search(NamedTuple):
    """B beams, on the device."""

    scores: jax.Array
    """[B] float32: of those that run, sums of log-probabilities, the best first."""
    best: jax.Array
    """[B] float32: the scores of the best that have ended; NEVER where there is none."""
    places: jax.Array
    """[3, B] int32: in which step those have ended, behind which running beam, with which token."""
    going: jax.Array
    """Whether a running beam can still get among them."""


@functools.partial(jax.jit, static_argnames=("early", "candidates"))
def _select(
    search: _Search, logits: jax.Array, step: jax.Array, most: int, ends: jax.Array,
    penalty: float, early: bool | Literal["never"], candidates: int,
) -> tuple[_Search, jax.Array, jax.Array]:  # fmt: skip
    """The beams behind logits [B, V], the token number `step` of `most`: with parents and tokens
    [B] of those that run on."""
    width, vocabulary = logits.shape
    totals = jax.nn.log_softmax(logits) + search.scores[:, None]
    values, places = jax.lax.top_k(totals.reshape(-1), candidates)
    parents, tokens = places // vocabulary, places % vocabulary
    ending = (tokens[:, None] == ends).any(axis=1) | (step == most)
    scores, running = jax.lax.top_k(jnp.where(ending, NEVER, values), width)
    # a worse candidate may run on in the place of one that ends, but not end
    counts = search.going & ending & (jnp.arange(candidates) < width)
    full = (search.best > NEVER).all()
    counts &= ~full if early is True else True
    new = jnp.where(counts, values / step**penalty, NEVER)
    best, order = jax.lax.top_k(jnp.concatenate([search.best, new]), width)
    places = jnp.stack([jnp.full(candidates, step), parents, tokens])
    places = jnp.concatenate([search.places, places], axis=1)[:, order]
    full = (best > NEVER).all()
    longest = jnp.where(penalty > 0, most, step) if early == "never" else step
    going = search.going & ~ending.all() & (~full | (scores[0] / longest**penalty > best[-1]))
    going &= ~full if early is True else True
    return _Search(scores, best, places, going), parents[running], tokens[running]


def beam_search(
    lab: Lab, prompt: Sequence[int], width: int, max_new_tokens: int, *,
    end_tokens: Sequence[int] = (), length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[Beam]:  # fmt: skip
    """The `width` best continuations of `prompt` (token ids), the best first.

    end_tokens: end a beam. length_penalty: more is better for long ones. early_stopping: True ends
    the search with the first `width` that have ended, False when no running beam would be better if
    it ended now, "never" when none can become better. As transformers'
    `GenerationMixin._beam_search`. Parents and tokens stay on the device: a step is queued before
    the host has read those of the one before. Raises as `Lab.prefill` and `Lab.step`.
    """
    begun = lab.prefill([prompt])
    branches = lab.branch(begun.handles[0], width)
    logits = jnp.broadcast_to(begun.logits, (width, begun.logits.shape[1]))
    ends = jnp.array([*end_tokens, -1], jnp.int32)
    search = _Search(
        jnp.full(width, NEVER).at[0].set(0.0),  # all are the same yet
        jnp.full(width, NEVER),
        jnp.zeros((3, width), jnp.int32),
        jnp.array(True),
    )
    rows, going = [], search.going
    for step in range(1, max_new_tokens + 1):
        search, parents, tokens = _select(
            search, logits, jnp.int32(step), max_new_tokens, ends, length_penalty, early_stopping,
            max(2, len(ends)) * width,
        )  # fmt: skip
        rows.append((parents, tokens))
        if step == max_new_tokens or not going:
            break
        going = search.going
        logits = branches.step(tokens, parents).logits
    branches.free()
    return _read(search, [tuple(map(np.asarray, row)) for row in rows])


def _read(search: _Search, rows: Sequence[tuple[np.ndarray, ...]]) -> list[Beam]:
    """What has ended, in full. rows: parents and tokens of each step's running beams."""
    found, places = [], np.asarray(search.places).T
    for score, (step, row, last) in zip(np.asarray(search.best), places, strict=True):
        tokens = [int(last)]
        for parents, drawn in reversed(rows[: step - 1]):
            tokens.append(int(drawn[row]))
            row = parents[row]
        if score > NEVER:
            found.append(Beam(float(score), tokens[::-1]))
    return found
