"""The pure step: token ids -> model -> logits, with the cache and progress carried through.

Two programs, each from token ids to sampled tokens. `extend` runs packed ragged tokens (prompts,
chunks, resumed sequences); `decode` runs a token a row, taken from the device's own last sample,
once or several times. Rows of `extend` may be decode steps, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from jaxserve.attention.paged import Cache, PagedOps
from jaxserve.packing.layout import ExtendArrays, ExtendLayout, RowFields
from jaxserve.sampler.sampler import Sampler
from jaxserve.sampler.state import RowParams, Sampled, SparseRows
from jaxserve.step.payloads import Drawn, Payload
from jaxserve.step.state import Progress

if TYPE_CHECKING:
    from jaxserve.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class StepModel:
    """The model as the step sees it."""

    bind: Callable[[tuple[jax.Array, ...]], Decoder]
    """Flat parameters -> module."""
    ops: PagedOps
    sampler: Sampler
    page_size: int
    """S, tokens."""
    payloads: tuple[Payload, ...]
    """What its steps report."""


class StepOutput(NamedTuple):
    """What a program's n steps draw for each of B rows; an extend program is one step. Entries of
    rows that do not sample are unspecified."""

    tokens: jax.Array
    """[n, B] int32."""
    payloads: dict[str, jax.Array]
    """By name, [n, B, ...]."""


def report(model: StepModel, drawn: Drawn) -> StepOutput:
    """One step's tokens and payloads, without the dimension of steps."""
    return StepOutput(drawn.tokens, {each.name: each.sampled(drawn) for each in model.payloads})


def one_of_many(output: StepOutput) -> StepOutput:
    """One step as a program of n = 1."""
    return jax.tree.map(lambda x: x[None], output)


class Packed(NamedTuple):
    """Each packed token's owner (row number), offset in its row, whether it is no padding: [T]."""

    owner: jax.Array
    offset: jax.Array
    valid: jax.Array


def locate(rows: RowFields, tokens: int) -> Packed:
    """Which row each of `tokens` packed tokens belongs to. Forks and padding start past the end, so
    the last row that starts at or before a token owns it."""
    index = jnp.arange(tokens, dtype=jnp.int32)
    # compare_all: one small fusion, where the default search is a loop of launches between graphs
    owner = jnp.searchsorted(rows.q_starts, index, side="right", method="compare_all")
    owner = owner.astype(jnp.int32) - 1
    offset = index - rows.q_starts[owner]
    return Packed(owner, offset, offset < rows.q_lens[owner])


def rotary_positions(batch: ExtendArrays, positions: jax.Array, carried: jax.Array) -> jax.Array:
    """Where each packed token is rotated to: its place, or what a layout with `positions` gives (of
    carried tokens nothing)."""
    given = batch.per_token.get("positions")
    return positions if given is None else jnp.where(carried, positions, given)


def cache_slots(
    page_table: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    page_size: int,
    num_slots: int,
) -> jax.Array:
    """Flat position of each token in a layer's pages, [T] int32: page * S + offset, and for tokens
    of padding distinct positions past the end of all layers, num_slots (a scatter drops those, and
    has no duplicates)."""
    pages = page_table[rows, positions // page_size]
    live = pages * page_size + positions % page_size
    return jnp.where(valid, live, num_slots + jnp.arange(rows.shape[0], dtype=jnp.int32))


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
) -> tuple[tuple[Cache, Progress, Sampled], StepOutput]:
    """`steps` tokens for each of B rows, one after the other: at most S, so that a row begins one
    page at most.

    upload [2, B] int32: slots (R for padding), and the page each row begins with these tokens (-1
    for none). Returns (the cache, progress and carry as updated), the output.
    """
    rows, new_pages = upload
    num_rows = progress.lengths.shape[0]
    live = rows < num_rows - 1
    first = progress.lengths[rows]
    begins = jnp.where(new_pages >= 0, rows, num_rows)
    begun = (first + (model.page_size - 1)) // model.page_size
    table = progress.page_table.at[begins, begun].set(new_pages, mode="drop")
    page_table = table[rows]
    module = model.bind(params)

    def one_step(
        carry: tuple[Cache, Sampled], positions: jax.Array
    ) -> tuple[tuple[Cache, Sampled], StepOutput]:
        cache, sampled = carry
        slots = cache_slots(
            page_table,
            jnp.arange(rows.shape[0]),
            positions,
            live,
            model.page_size,
            num_slots=cache.k.shape[0] * model.page_size,
        )
        lengths = jnp.where(live, positions + 1, 0)
        meta = DecodeMeta(slots, page_table, lengths)
        hidden, cache = module(sampled.last_tokens[rows], positions, cache, meta, model.ops)
        logits = module.logits(hidden)
        sampled, *drawn = model.sampler(logits, sampled, rows, lengths, row_params, sparse)
        return (cache, sampled), report(model, Drawn(hidden, logits, *drawn))

    carry = (cache, sampled)
    if steps == 1:
        carry, output = one_step(carry, first)
        output = one_of_many(output)
    else:
        positions = first + jnp.arange(steps, dtype=jnp.int32)[:, None]
        carry, output = jax.lax.scan(one_step, carry, positions)
    cache, sampled = carry
    lengths = progress.lengths.at[rows].set(jnp.where(live, first + steps, 0))
    return (cache, Progress(lengths, table), sampled), output


def extend_step(
    model: StepModel,
    layout: ExtendLayout,
    params: tuple[jax.Array, ...],
    cache: Cache,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    sparse: SparseRows,
    packed: jax.Array,
) -> tuple[tuple[Cache, Progress, Sampled, RowParams], tuple[StepOutput, jax.Array]]:
    """Run T packed tokens of up to B rows.

    packed: one int32 vector, see ExtendLayout. Returns (the cache, progress, carry and row
    parameters as updated), (the output, and hidden [T, D] for `prompt.prompt_payload`).
    """
    batch = layout.unpack(packed)
    num_rows = progress.lengths.shape[0]
    slots = batch.rows.slots
    table = progress.page_table.at[slots].set(batch.page_table)
    lengths = jnp.where(slots < num_rows - 1, batch.rows.new_lengths, 0)
    progress = Progress(progress.lengths.at[slots].set(lengths), table)
    row_params = RowParams(
        row_params.floats.at[slots].set(batch.floats), row_params.ints.at[slots].set(batch.ints)
    )
    owner, offset, valid = locate(batch.rows, layout.tokens)
    positions = jnp.where(valid, batch.rows.prefix_lens[owner] + offset, 0)
    carried = valid & (batch.rows.carried[owner] > 0)
    tokens = jnp.where(carried, sampled.last_tokens[slots[owner]], batch.per_token["tokens"])

    # a slot's counts start from zero, and a resumed sequence's outputs are counted again; carried
    # tokens were when they were sampled
    counts = sampled.counts
    counts = counts.at[jnp.where(batch.rows.fresh > 0, slots, num_rows)].set(0, mode="drop")
    generated = valid & ~carried & (positions >= row_params.column("prompt_len", slots[owner]))
    counts = counts.at[jnp.where(generated, slots[owner], num_rows), tokens].add(1, mode="drop")

    cache_positions = cache_slots(
        batch.page_table,
        owner,
        positions,
        valid,
        model.page_size,
        num_slots=cache.k.shape[0] * model.page_size,
    )
    meta = ExtendMeta(
        cache_positions,
        batch.page_table,
        batch.rows.q_starts,
        batch.rows.q_lens,
        batch.rows.prefix_lens,
    )
    module = model.bind(params)
    rotated = rotary_positions(batch, positions, carried)
    hidden, cache = module(tokens, rotated, cache, meta, model.ops)
    last_hidden = hidden[jnp.maximum(batch.rows.sample_at, 0)]
    logits = module.logits(last_hidden)
    rows = jnp.where(batch.rows.sample_at >= 0, slots, num_rows - 1)
    sampled = Sampled(sampled.last_tokens, counts)
    sampled, *drawn = model.sampler(logits, sampled, rows, lengths, row_params, sparse)
    output = one_of_many(report(model, Drawn(last_hidden, logits, *drawn)))
    return (cache, progress, sampled, row_params), (output, hidden)
