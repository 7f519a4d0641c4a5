"""Decode steps that draw with a chain in the model's own program, one or several a dispatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import Cache
from jaxserve.sampler.state import RowParams, Sampled, SparseRows
from jaxserve.step.chain_rows import ChainModel, ChainRows, ChainState, Kept
from jaxserve.step.decode import DecodeRows, Made, Seen, run_steps
from jaxserve.step.state import Progress
from jaxserve.step.step import StepModel, StepOutput


def decode_fused(
    of: ChainModel,
    model: StepModel,
    steps: int,
    params: tuple[jax.Array, ...],
    cache: Cache,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    sparse: SparseRows,
    own: ChainState,
    tables: Mapping[str, jax.Array],
    upload: jax.Array,
    chained: jax.Array,
    comm: jax.Array | None = None,
    token_pages: jax.Array | None = None,
) -> tuple[tuple[Any, ...], StepOutput]:
    """`decode.decode_steps` of rows with one chain, and of rows without.

    chained [B] int32: the slots of those that have it, R for others. token_pages: as of
    `chained.draw_chained`. Returns (the cache, progress, carry, own and token_pages as updated),
    the output.
    """
    module = model.bind(params) if of.chain.head else None
    has_it = (chained < progress.lengths.shape[0] - 1)[:, None]

    def draw(
        rows: DecodeRows, seen: Seen, positions: jax.Array, sampled: Sampled, kept: Kept
    ) -> Made:
        its = ChainRows(
            of, module, tables, kept, chained, rows.page_table, positions, row_params, seen
        )

        def change(logits: jax.Array) -> jax.Array:
            return jnp.where(has_it, its.apply(logits), logits)

        sampled, tokens, logprobs = model.sampler(
            seen.logits, sampled, rows.slots, positions, row_params, sparse, change
        )
        return Made(sampled, tokens, logprobs, its.after(tokens, logprobs))

    given = (params, cache, progress, sampled, row_params, upload, comm)
    (*updated, kept), output = run_steps(model, steps, draw, *given, kept=Kept(own, token_pages))
    return (*updated, *kept.updated), output
