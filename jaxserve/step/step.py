"""The pure step: token ids -> model -> logits, with the cache and progress carried through.

Two programs, each from token ids to sampled tokens. `extend` runs packed ragged tokens (prompts,
chunks, resumed sequences); `decode` (in decode.py) runs a token a row, taken from the device's own
last sample, once or several times. Rows of `extend` may be decode steps, too.
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
from jaxserve.step.hook import Hook
from jaxserve.step.hooked import HookState, TappedOps, Taps, Tokens
from jaxserve.step.payloads import Drawn, Payload
from jaxserve.step.pictures import Embedded, Shown, embed
from jaxserve.step.state import Progress
from jaxserve.step.watched import Watched

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
    layers: tuple[int, ...] = ()
    """The inner layers among it, see `config.States`."""
    hooks: tuple[Hook, ...] = ()
    """In the model, for rows that have them."""
    shifted: bool = False
    """Whether generated tokens are rotated to their places and something more, see
    `Request.position_delta`."""


class StepOutput(NamedTuple):
    """What a program's n steps draw for each of B rows; an extend program is one step. Entries of
    rows that do not sample are unspecified."""

    tokens: jax.Array
    """[n, B] int32."""
    payloads: dict[str, jax.Array]
    """By name, [n, B, ...]."""
    layers: jax.Array | None = None
    """Of an extend step that reports inner layers [T, C, D], by packed token."""


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


def rotary_positions(
    batch: ExtendArrays, positions: jax.Array, carried: jax.Array, deltas: jax.Array
) -> jax.Array:
    """Where each packed token is rotated to: its place, or what a layout with `positions` gives; of
    carried tokens the place and `deltas`."""
    given = batch.per_token.get("positions")
    return positions if given is None else jnp.where(carried, positions + deltas, given)


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


def run_model(
    model: StepModel,
    module: Decoder,
    ops: PagedOps,
    begun: Embedded,
    positions: jax.Array,
    cache: Cache,
    meta: DecodeMeta | ExtendMeta,
    taps: Taps | None,
) -> tuple[jax.Array, jax.Array | None, Cache]:
    """T tokens at `positions`: hidden [T, D], the inner layers that are reported [T, C, D], the new
    cache. taps: hooks."""
    watched = Watched(ops, model.layers)
    x, tapped = begun.x, ops
    if taps is not None:
        x, tapped = taps.touch("embed", x), TappedOps(ops, taps)
    hidden, cache = module.run(x, positions, cache, meta, tapped, watched, begun.added)
    if taps is not None:
        hidden = taps.touch("final_norm", hidden)
    return hidden, watched.stacked(hidden), cache


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
    comm: jax.Array | None = None,
    media: jax.Array | None = None,
    hooked: jax.Array | None = None,
    *states: HookState,
) -> tuple[tuple[Cache, Progress, Sampled, RowParams], tuple[StepOutput, jax.Array]]:
    """Run T packed tokens of up to B rows.

    packed: one int32 vector, see ExtendLayout. comm: see `PagedOps.joined`. media: see
    `pictures.Shown`, for a layout that says which rows stand where. hooked [B] int32: the number of
    each row's hook, 0 for none; states: what the device keeps for hooks 1, 2, ... Returns (the
    cache, progress, carry and row parameters as updated), (the output, and hidden [T, D] for
    `prompt.prompt_payload`).
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
    reach = batch.per_token.get("reach")
    if reach is not None:
        reach = jnp.where(valid & ~carried, reach, positions)
    meta = ExtendMeta(
        cache_positions,
        batch.page_table,
        batch.rows.q_starts,
        batch.rows.q_lens,
        batch.rows.prefix_lens,
        reach,
    )
    module, ops = model.bind(params), model.ops.joined(comm)
    deltas = row_params.column("position_delta", slots[owner])
    rotated = rotary_positions(batch, positions, carried, deltas)
    shown = None
    if media is not None:
        shown = Shown(media, jnp.where(valid & ~carried, batch.per_token["media"], 0) - 1)
    taps = None
    if hooked is not None:
        whose = Tokens(jnp.where(valid, hooked[owner], 0), slots[owner], positions)
        taps = Taps(model.hooks, states, whose)
    begun = embed(module, tokens, shown)
    hidden, inner, cache = run_model(model, module, ops, begun, rotated, cache, meta, taps)
    last = jnp.maximum(batch.rows.sample_at, 0)
    last_hidden, last_inner = jax.tree.map(lambda x: x[last], (hidden, inner))
    logits = module.logits(last_hidden)
    rows = jnp.where(batch.rows.sample_at >= 0, slots, num_rows - 1)
    sampled = Sampled(sampled.last_tokens, counts)
    sampled, *drawn = model.sampler(logits, sampled, rows, lengths, row_params, sparse)
    output = one_of_many(report(model, Drawn(last_hidden, logits, *drawn, layers=last_inner)))
    return (cache, progress, sampled, row_params), (output._replace(layers=inner), hidden)
