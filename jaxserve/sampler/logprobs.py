"""Logprobs on the device: of the chosen token, the best few, and ids the caller named."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxserve.step.payloads import PromptRows


class TokenLogprobs(NamedTuple):
    """Of one token of each of B rows. Entries that nobody asked for are unspecified."""

    chosen: jax.Array
    """[B] float32: of the token itself."""
    top_values: jax.Array
    """[B, C] float32: the best, in falling order."""
    top_ids: jax.Array
    """[B, C] int32: their tokens."""
    named: jax.Array
    """[B, I] float32: of the tokens that the caller named."""

    def pack(self) -> jax.Array:
        """All of it as one array, [B, 2 + C + I + C] int32 with C in front, see
        output.logprobs.Columns: each array that a step returns costs the host some microseconds."""
        floats = jnp.concatenate([self.chosen[:, None], self.top_values, self.named], axis=1)
        bits = jax.lax.bitcast_convert_type(floats, jnp.int32)
        top = jnp.full((floats.shape[0], 1), self.top_ids.shape[1], jnp.int32)
        return jnp.concatenate([top, bits, self.top_ids], axis=1)


def chosen_logprobs(packed: jax.Array) -> jax.Array:
    """[B] float32: `chosen` of what `TokenLogprobs.pack` has packed."""
    return jax.lax.bitcast_convert_type(packed[:, 1], jnp.float32)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, named_ids: jax.Array, top: int, wants_top: jax.Array
) -> TokenLogprobs:
    """log_softmax of logits [B, V] at `tokens` [B], at `named_ids` [B, I], and the `top` best.

    The best few cost a partial sort of the vocabulary, so they are found only where `wants_top`
    (a scalar bool). Values are clamped to the float32 range: never -inf.
    """
    lowest = jnp.finfo(jnp.float32).min
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def at(ids: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.take_along_axis(logits, ids, axis=-1) - norm, lowest)

    def best() -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(logits, min(top, logits.shape[-1]))
        missing = ((0, 0), (0, top - ids.shape[1]))
        return jnp.pad(jnp.maximum(values - norm, lowest), missing), jnp.pad(ids, missing)

    rows = logits.shape[0]
    neutral = (jnp.zeros((rows, top)), jnp.zeros((rows, top), jnp.int32))
    top_values, top_ids = jax.lax.cond(wants_top, best, lambda: neutral)
    return TokenLogprobs(at(tokens[:, None])[:, 0], top_values, top_ids, at(named_ids))


def raw_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B] float32: log_softmax of the model's own logits [B, V] at `tokens` [B]; never -inf."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    found = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.maximum(found, jnp.finfo(jnp.float32).min)


def prompt_logprobs(rows: PromptRows) -> jax.Array:
    """Packed logprobs [N, X], at temperature 1, of the tokens that follow in the prompt."""
    tops = rows.row_params.column("num_top", rows.slots)
    named = rows.sparse.logprob_ids[rows.slots]
    wants_top = jnp.any(rows.wanted & (tops > 0))
    return token_logprobs(rows.logits, rows.successors, named, rows.top, wants_top).pack()
