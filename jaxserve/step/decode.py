"""The decode step: a token for each row, taken from the device's own last sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.meta import DecodeMeta
from jaxserve.attention.paged import Cache, PagedOps
from jaxserve.sampler.state import RowParams, Sampled, SparseRows
from jaxserve.step.hooked import Taps
from jaxserve.step.payloads import Drawn
from jaxserve.step.pictures import embed
from jaxserve.step.state import Progress
from jaxserve.step.step import (
    StepModel,
    StepOutput,
    cache_slots,
    one_of_many,
    report,
    run_model,
)

if TYPE_CHECKING:
    from jaxserve.models.decoder import Decoder


class DecodeRows(NamedTuple):
    """The B rows of a decode step."""

    slots: jax.Array
    """[B] int32: R for padding."""
    live: jax.Array
    """[B] bool: no padding."""
    first: jax.Array
    """[B] int32: the position that each row's next token has."""
    table: jax.Array
    """[R+1, W] int32: all page tables, with the pages that rows begin now."""
    page_table: jax.Array
    """[B, W] int32: the rows' own."""

    def after(self, progress: Progress, steps: int) -> Progress:
        """When each row has run `steps` tokens."""
        lengths = jnp.where(self.live, self.first + steps, 0)
        return Progress(progress.lengths.at[self.slots].set(lengths), self.table)


class Seen(NamedTuple):
    """What a model makes of one token for each of B rows."""

    tokens: jax.Array
    """[B] int32: those that ran."""
    hidden: jax.Array
    """[B, D] after the final norm."""
    logits: jax.Array
    """[B, V] float32."""
    layers: jax.Array | None
    """[B, C, D] of the inner layers that are reported; None: of none."""


class Made(NamedTuple):
    """What is drawn of it."""

    sampled: Sampled
    """The carry as updated."""
    tokens: jax.Array
    """[B] int32."""
    logprobs: jax.Array
    """Theirs, packed (`sampler.logprobs.TokenLogprobs`)."""
    kept: Any
    """What else goes on to the next step."""


Draw = Callable[[DecodeRows, Seen, jax.Array, Sampled, Any], Made]
"""(rows, what the model has made, positions [B] of the tokens drawn now and 0 of padding, the
carry, `Made.kept` of the step before) -> what is drawn."""


def decode_rows(model: StepModel, progress: Progress, upload: jax.Array) -> DecodeRows:
    """The rows of `upload`, see `decode_steps`."""
    slots, new_pages = upload
    num_rows = progress.lengths.shape[0]
    first = progress.lengths[slots]
    begins = jnp.where(new_pages >= 0, slots, num_rows)
    begun = (first + (model.page_size - 1)) // model.page_size
    table = progress.page_table.at[begins, begun].set(new_pages, mode="drop")
    return DecodeRows(slots, slots < num_rows - 1, first, table, table[slots])


def forward(
    model: StepModel,
    module: Decoder,
    ops: PagedOps,
    rows: DecodeRows,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    row_params: RowParams,
    taps: Taps | None = None,
) -> tuple[Seen, Cache]:
    """One token [B] for each row, at `positions` [B]: what comes of it, new cache."""
    slots = cache_slots(
        rows.page_table,
        jnp.arange(rows.slots.shape[0]),
        positions,
        rows.live,
        model.page_size,
        num_slots=cache.k.shape[0] * model.page_size,
    )
    meta = DecodeMeta(slots, rows.page_table, jnp.where(rows.live, positions + 1, 0))
    rotated = positions
    if model.shifted:
        rotated = positions + row_params.column("position_delta", rows.slots)
    begun = embed(module, tokens)
    hidden, layers, cache = run_model(model, module, ops, begun, rotated, cache, meta, taps)
    return Seen(tokens, hidden, module.logits(hidden), layers), cache


def run_steps(
    model: StepModel,
    steps: int,
    draw: Draw,
    params: tuple[jax.Array, ...],
    cache: Cache,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    upload: jax.Array,
    comm: jax.Array | None,
    kept: Any,
) -> tuple[tuple[Cache, Progress, Sampled, Any], StepOutput]:
    """`decode_steps` with `draw`, and `kept` of the step before the first."""
    rows = decode_rows(model, progress, upload)
    module, ops = model.bind(params), model.ops.joined(comm)

    def one_step(
        carry: tuple[Cache, Sampled, Any], positions: jax.Array
    ) -> tuple[tuple[Cache, Sampled, Any], StepOutput]:
        cache, sampled, kept = carry
        tokens = sampled.last_tokens[rows.slots]
        seen, cache = forward(model, module, ops, rows, tokens, positions, cache, row_params)
        lengths = jnp.where(rows.live, positions + 1, 0)
        made = draw(rows, seen, lengths, sampled, kept)
        drawn = Drawn(seen.hidden, seen.logits, made.tokens, made.logprobs, layers=seen.layers)
        return (cache, made.sampled, made.kept), report(model, drawn)

    carry = (cache, sampled, kept)
    if steps == 1:
        carry, output = one_step(carry, rows.first)
        output = one_of_many(output)
    else:
        positions = rows.first + jnp.arange(steps, dtype=jnp.int32)[:, None]
        carry, output = jax.lax.scan(one_step, carry, positions)
    cache, sampled, kept = carry
    return (cache, rows.after(progress, steps), sampled, kept), output


def decode_steps(
    model: StepModel,
    steps: int,
    params: tuple[jax.Array, ...],
    cache: Cache,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    sparse: SparseRows,
    upload: jax.Array,
    comm: jax.Array | None = None,
) -> tuple[tuple[Cache, Progress, Sampled], StepOutput]:
    """`steps` tokens for each of B rows, one after the other: at most S, so that a row begins one
    page at most.

    upload [2, B] int32: slots (R for padding), and the page each row begins with these tokens (-1
    for none). comm: see `PagedOps.joined`. Returns (the cache, progress and carry as updated), the
    output.
    """

    def draw(
        rows: DecodeRows, seen: Seen, positions: jax.Array, sampled: Sampled, kept: Any
    ) -> Made:
        sampler = model.sampler
        drawn = sampler(seen.logits, sampled, rows.slots, positions, row_params, sparse)
        return Made(*drawn, kept)

    given = (params, cache, progress, sampled, row_params, upload, comm)
    (cache, progress, sampled, _), output = run_steps(model, steps, draw, *given, kept=())
    return (cache, progress, sampled), output
