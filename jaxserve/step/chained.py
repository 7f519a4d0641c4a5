"""Steps of rows with chains: the model and the draw are programs of their own.

`forward` is a decode step up to the logits; an extend step has hidden states, of which `pick` and
`head` make the same. Then each chain of the batch has one program that draws its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxserve.attention.paged import Cache
from jaxserve.sampler.state import RowParams, Sampled, SparseRows
from jaxserve.step.chain import Chain, arrays_of
from jaxserve.step.chain_rows import ChainModel, ChainRows, ChainState, Kept
from jaxserve.step.decode import Seen, decode_rows, forward
from jaxserve.step.hooked import HookState, Taps, Tokens
from jaxserve.step.payloads import STATES, Drawn
from jaxserve.step.state import Progress
from jaxserve.step.step import (
    StepModel,
    StepOutput,
    one_of_many,
    report,
)


class Undrawn(NamedTuple):
    """B rows before their tokens are drawn. Of rows that draw none, anything."""

    hidden: jax.Array
    """[B, D] after the final norm."""
    logits: jax.Array
    """[B, V] float32."""
    tokens: jax.Array
    """[B] int32: the last ones that ran."""


class Said(NamedTuple):
    """What guides have said of B rows."""

    bits: Any
    """[B, ceil(V / 32)] int32: the tokens that may come, see `Guide.mask`."""
    edited: Any
    """[B] int32: 1 where the logits are as a guide has left them."""


def forward_rows(
    model: StepModel,
    params: tuple[jax.Array, ...],
    cache: Cache,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    upload: jax.Array,
    comm: jax.Array | None = None,
    hooked: jax.Array | None = None,
    *states: HookState,
) -> tuple[tuple[Cache, Progress], tuple[Undrawn, jax.Array | None]]:
    """`decode.decode_steps` of one step, without the draw. hooked, states: as of
    `step.extend_step`. Returns the rows and, if they are reported, their inner layers [B, C, D]."""
    rows = decode_rows(model, progress, upload)
    taps = None
    if hooked is not None:
        taps = Taps(model.hooks, states, Tokens(hooked, rows.slots, rows.first))
    module, ops = model.bind(params), model.ops.joined(comm)
    tokens = sampled.last_tokens[rows.slots]
    seen, cache = forward(model, module, ops, rows, tokens, rows.first, cache, row_params, taps)
    undrawn = Undrawn(seen.hidden, seen.logits, tokens)
    return (cache, rows.after(progress, 1)), (undrawn, seen.layers)


def pick_rows(
    sampled: Sampled, hidden: jax.Array, tokens: jax.Array, places: jax.Array
) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
    """Hidden states [B, D] and tokens [B] of an extend step's last tokens.

    hidden [T, D]. tokens [B] int32: what the host knows of them. places [2, B] int32: their packed
    rows, and the slots of which they are the last samples (-1: of none).
    """
    at, carried = places
    last = jnp.where(carried >= 0, sampled.last_tokens[carried], tokens)
    return (), (hidden[at], last)


def pick_layers(layers: jax.Array, places: jax.Array) -> tuple[tuple[()], jax.Array]:
    """Inner layers [B, C, D] of an extend step's [T, C, D], as `pick_rows`."""
    return (), layers[places[0]]


def inside_rows(
    names: tuple[str, ...], undrawn: Undrawn, layers: jax.Array | None = None
) -> tuple[tuple[()], dict[str, jax.Array]]:
    """The model's inside by name, [1, B, ...], as a step of one program reports it."""
    drawn = Drawn(undrawn.hidden, undrawn.logits, undrawn.tokens, undrawn.tokens, layers)
    return (), jax.tree.map(lambda x: x[None], {name: STATES[name](drawn) for name in names})


def head_rows(
    model: StepModel, params: tuple[jax.Array, ...], hidden: jax.Array
) -> tuple[tuple[()], jax.Array]:
    """Logits [B, V] float32 of hidden [B, D]."""
    return (), model.bind(params).logits(hidden)


def draw_rows(
    model: StepModel,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    sparse: SparseRows,
    undrawn: Undrawn,
    slots: jax.Array,
    said: Said,
) -> tuple[tuple[Sampled], StepOutput]:
    """The rows without a chain. slots [B] int32: R for all others."""
    positions = _positions(progress, slots)
    change = functools.partial(guided, said, undrawn.logits)
    sampled, *drawn = model.sampler(
        undrawn.logits, sampled, slots, positions, row_params, sparse, change
    )
    output = report(model, Drawn(undrawn.hidden, undrawn.logits, *drawn))
    return (sampled,), one_of_many(output)


def draw_chained(
    of: ChainModel,
    wanted: tuple[str, ...],
    model: StepModel,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    sparse: SparseRows,
    own: ChainState,
    tables: Mapping[str, jax.Array],
    undrawn: Undrawn,
    slots: jax.Array,
    said: Said,
    *given: Any,
) -> tuple[tuple[Any, ...], StepOutput]:
    """The rows of a chain: as `draw_rows`, with logits that it has changed.

    given: what only some chains read, by the names `wanted`: token_pages [P, S] int32, the tokens
    beside their keys and values; layers [B, C, D], the inner layers; params, those of the model.
    Returns (sampled, own and token_pages as updated), the output.
    """
    read = dict(zip(wanted, given, strict=True))
    positions, pages = _positions(progress, slots), progress.page_table[slots]
    seen = Seen(undrawn.tokens, undrawn.hidden, undrawn.logits, read.get("layers"))
    module = model.bind(read["params"]) if "params" in read else None
    kept = Kept(own, read.get("token_pages"))
    rows = ChainRows(of, module, tables, kept, slots, pages, positions, row_params, seen)

    def change(logits: jax.Array) -> jax.Array:
        return rows.apply(guided(said, undrawn.logits, logits))

    sampled, tokens, logprobs = model.sampler(
        undrawn.logits, sampled, slots, positions, row_params, sparse, change
    )
    kept = rows.after(tokens, logprobs)
    output = report(model, Drawn(undrawn.hidden, undrawn.logits, tokens, logprobs))
    return (sampled, *kept.updated), one_of_many(output)


def allowed(bits: jax.Array, logits: jax.Array) -> jax.Array:
    """logits [B, V], and -inf for tokens whose bits [B, ceil(V / 32)] are clear."""
    token = jnp.arange(logits.shape[1])
    # not `jnp.repeat`: its sums over the vocabulary keep XLA busy for seconds, for constants
    of_token = jnp.broadcast_to(bits[:, :, None], (*bits.shape, 32)).reshape(bits.shape[0], -1)
    is_set = (of_token[:, : logits.shape[1]] >> (token % 32)) & 1
    return jnp.where(is_set != 0, logits, -jnp.inf)


def guided(said: Said, given: jax.Array, logits: jax.Array) -> jax.Array:
    """What transforms see [B, V]: `logits`, which are after penalties and biases, without the
    tokens that guides forbid; of edited rows those `given` to the program."""
    return jnp.where(said.edited[:, None] > 0, given, allowed(said.bits, logits))


def adjusted_rows(
    model: StepModel,
    progress: Progress,
    sampled: Sampled,
    row_params: RowParams,
    sparse: SparseRows,
    logits: jax.Array,
    slots: jax.Array,
    bits: jax.Array,
) -> tuple[tuple[()], jax.Array]:
    """Logits [B, V] as guides edit them: after penalties, biases and masks."""
    positions = _positions(progress, slots)
    begun = model.sampler.begin(logits, sampled, slots, positions, row_params, sparse)
    return (), allowed(bits, pallas_kernels.adjust(*begun))


def peek_row(logits: jax.Array, row: jax.Array) -> tuple[tuple[()], jax.Array]:
    """Row `row` of logits [B, V]."""
    return (), logits[row]


def poke_row(logits: jax.Array, row: jax.Array, values: jax.Array) -> tuple[tuple[()], jax.Array]:
    """logits [B, V] with `values` [V] as row `row`."""
    return (), logits.at[row].set(values)


def admit_row(
    chain: Chain,
    kept: ChainState,
    tables: Mapping[str, jax.Array],
    slot: jax.Array,
    floats: jax.Array,
    ints: jax.Array,
    fresh: jax.Array,
    tokens: jax.Array,
    logprobs: jax.Array,
    count: jax.Array,
) -> tuple[tuple[ChainState], tuple[()]]:
    """A slot's parameters [F], [I] and its state: that before the first token, if `fresh`, after
    the first `count` of tokens [N] int32 and their logprobs [N] have been observed."""
    params = chain.params(floats, ints, tables)
    first = arrays_of(chain.transform.init(params))
    own = jax.tree.map(lambda x, new: jnp.where(fresh > 0, new, x[slot]), kept.state, first)

    def body(i: jax.Array, own: Any) -> Any:
        return arrays_of(chain.transform.observe(own, params, tokens[i], logprobs[i]))

    own = jax.lax.fori_loop(0, count, body, own)
    state = jax.tree.map(lambda x, new: x.at[slot].set(new), kept.state, own)
    kept = ChainState(state, kept.floats.at[slot].set(floats), kept.ints.at[slot].set(ints))
    return (kept,), ()


def note_tokens(
    token_pages: jax.Array, pages: jax.Array, tokens: jax.Array
) -> tuple[tuple[jax.Array], tuple[()]]:
    """Write whole pages: pages [N] int32 (P for none), tokens [N, S] int32."""
    return (token_pages.at[pages].set(tokens, mode="drop"),), ()


def _positions(progress: Progress, slots: jax.Array) -> jax.Array:
    """[B] int32: of the tokens drawn now; 0 of padding."""
    live = slots < progress.lengths.shape[0] - 1
    return jnp.where(live, progress.lengths[slots], 0)
