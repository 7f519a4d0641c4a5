"""What an extend step's hidden states say of its prompts: payloads of their tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.packing.layout import ExtendLayout
from jaxserve.sampler.state import RowParams, SparseRows
from jaxserve.step.payloads import PromptRows
from jaxserve.step.step import StepModel, locate

ROWS = 256
"""Rows of logits alive at once."""


def prompt_payload(
    model: StepModel,
    layout: ExtendLayout,
    payload: Callable[[PromptRows], jax.Array],
    params: tuple[jax.Array, ...],
    row_params: RowParams,
    sparse: SparseRows,
    packed: jax.Array,
    hidden: jax.Array,
) -> tuple[tuple[()], jax.Array]:
    """`payload` [T, ...] of each packed token of an extend step; nothing is donated.

    hidden [T, D] is the extend step's. The LM head runs on a few hundred rows at a time; chunks in
    which no token is wanted are skipped. Entries of tokens that are not wanted are unspecified.
    """
    batch = layout.unpack(packed)
    tokens = batch.per_token["tokens"]
    owner, offset, valid = locate(batch.rows, layout.tokens)
    wanted = valid & (batch.rows.wants_prompt[owner] > 0)
    last = offset == batch.rows.q_lens[owner] - 1
    successors = jnp.where(last, batch.rows.next_tokens[owner], jnp.roll(tokens, -1))
    successors = jnp.maximum(successors, 0)
    slots = batch.rows.slots[owner]
    module = model.bind(params)
    rows = min(ROWS, layout.tokens)

    def from_row(start: jax.Array) -> jax.Array:
        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, rows)

        logits = module.logits(part(hidden))
        return payload(
            PromptRows(
                part(hidden),
                logits,
                part(successors),
                part(slots),
                part(wanted),
                row_params,
                sparse,
                model.sampler.top,
            )
        )

    shape = jax.eval_shape(from_row, 0)
    neutral = jnp.zeros(shape.shape, shape.dtype)

    def chunk(i: jax.Array, result: jax.Array) -> jax.Array:
        # the last chunk is moved back to end at T: the overlap is computed twice, and equal
        start = jnp.minimum(i * rows, layout.tokens - rows)
        some = jnp.any(jax.lax.dynamic_slice_in_dim(wanted, start, rows))
        found = jax.lax.cond(some, lambda: from_row(start), lambda: neutral)
        return jax.lax.dynamic_update_slice_in_dim(result, found, start, 0)

    result = jnp.zeros((layout.tokens, *shape.shape[1:]), shape.dtype)
    return (), jax.lax.fori_loop(0, -(-layout.tokens // rows), chunk, result)
