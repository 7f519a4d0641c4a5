"""The pure step: token ids -> model -> logits, with the cache and progress carried through.

Two programs. `extend` runs packed ragged tokens (prompts, chunks, resumed sequences); `decode` runs
one token a row, taken from the device's own last sample. `input_logprobs` follows an extend step
whose prompts' logprobs are wanted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.attend import LayerCache
from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from jaxserve.batch.pack import ExtendArrays, ExtendLayout
from jaxserve.sampler import logprobs as lp
from jaxserve.step.state import INTS, Progress, RowParams, SparseRows

Cache = list[LayerCache]
PROMPT_LEN, NUM_TOP = INTS.index("prompt_len"), INTS.index("num_top")
INPUT_LOGPROB_ROWS = 256
"""Rows of logits alive at once when input logprobs are wanted."""


@dataclasses.dataclass(frozen=True)
class StepModel:
    """The model as the step sees it. bind: flat parameters -> module; attend: attention entry."""

    bind: Callable[[tuple[jax.Array, ...]], Any]
    attend: Callable[..., tuple[jax.Array, LayerCache]]
    page_size: int


class ExtendOutput(NamedTuple):
    """logits [B, V] float32 of each row's last token; rows [B] int32: the slots whose sample counts
    (R for the others); hidden [T, D]: for `input_logprobs`."""

    logits: jax.Array
    rows: jax.Array
    hidden: jax.Array


class Packed(NamedTuple):
    """Each packed token's owner (row number), offset in its row, whether it is no padding: [T]."""

    owner: jax.Array
    offset: jax.Array
    valid: jax.Array


def locate(batch: ExtendArrays, tokens: int) -> Packed:
    """Which row each of `tokens` packed tokens belongs to. Forks and padding start past the end, so
    the last row that starts at or before a token owns it."""
    index = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.searchsorted(batch.q_starts, index, side="right").astype(jnp.int32) - 1
    offset = index - batch.q_starts[owner]
    return Packed(owner, offset, offset < batch.q_lens[owner])


def cache_slots(
    page_table: jax.Array, rows: jax.Array, positions: jax.Array, valid: jax.Array,
    page_size: int, num_slots: int,
) -> jax.Array:  # fmt: skip
    """Flat cache position of each token, [T] int32: page * S + offset, and for tokens of padding
    distinct positions past the cache's end (the scatter drops those, and has no duplicates)."""
    pages = page_table[rows, positions // page_size]
    live = pages * page_size + positions % page_size
    return jnp.where(valid, live, num_slots + jnp.arange(rows.shape[0], dtype=jnp.int32))


def decode_step(
    model: StepModel, params: tuple[jax.Array, ...], cache: Cache, progress: Progress,
    last_tokens: jax.Array, rows: jax.Array, new_pages: jax.Array,
) -> tuple[Cache, Progress, jax.Array]:  # fmt: skip
    """One token for each of B rows.

    rows [B] int32: slots, R for padding. new_pages [B] int32: the page a row begins with this
    token, -1 for none. Returns the cache, the progress and logits [B, V] float32.
    """
    num_rows = progress.lengths.shape[0]
    live = rows < num_rows - 1
    positions = progress.lengths[rows]
    begins = jnp.where(new_pages >= 0, rows, num_rows)
    table = progress.page_table.at[begins, positions // model.page_size].set(new_pages, mode="drop")
    page_table = table[rows]
    slots = cache_slots(
        page_table, jnp.arange(rows.shape[0]), positions, live, model.page_size,
        num_slots=cache[0][0].shape[0] * model.page_size,
    )  # fmt: skip
    meta = DecodeMeta(slots, page_table, jnp.where(live, positions + 1, 0))
    module = model.bind(params)
    hidden, cache = module(last_tokens[rows], positions, cache, meta, model.attend)
    lengths = progress.lengths.at[rows].set(jnp.where(live, positions + 1, 0))
    return cache, Progress(lengths, table), module.logits(hidden)


def extend_step(
    model: StepModel, layout: ExtendLayout, params: tuple[jax.Array, ...], cache: Cache,
    progress: Progress, counts: jax.Array, row_params: RowParams, packed: jax.Array,
) -> tuple[Cache, Progress, jax.Array, RowParams, ExtendOutput]:  # fmt: skip
    """Run T packed tokens of up to B rows.

    packed: one int32 vector, see ExtendLayout. Returns the cache, progress, counts and row
    parameters as updated, and the output.
    """
    batch = layout.unpack(packed)
    num_rows = progress.lengths.shape[0]
    slots = batch.slots
    table = progress.page_table.at[slots].set(batch.page_table)
    lengths = progress.lengths.at[slots].set(jnp.where(slots < num_rows - 1, batch.new_lengths, 0))
    row_params = RowParams(
        row_params.floats.at[slots].set(batch.floats), row_params.ints.at[slots].set(batch.ints)
    )
    tokens = batch.tokens
    owner, offset, valid = locate(batch, layout.tokens)
    positions = jnp.where(valid, batch.prefix_lens[owner] + offset, 0)

    # a slot's counts start from zero, and a resumed sequence's outputs are counted again
    counts = counts.at[jnp.where(batch.fresh > 0, slots, num_rows)].set(0, mode="drop")
    generated = valid & (positions >= row_params.ints[slots[owner], PROMPT_LEN])
    counts = counts.at[jnp.where(generated, slots[owner], num_rows), tokens].add(1, mode="drop")

    cache_positions = cache_slots(
        batch.page_table, owner, positions, valid, model.page_size,
        num_slots=cache[0][0].shape[0] * model.page_size,
    )  # fmt: skip
    meta = ExtendMeta(
        cache_positions, batch.page_table, batch.q_starts, batch.q_lens, batch.prefix_lens
    )
    module = model.bind(params)
    hidden, cache = module(tokens, positions, cache, meta, model.attend)
    logits = module.logits(hidden[jnp.maximum(batch.sample_at, 0)])
    sample_rows = jnp.where(batch.sample_at >= 0, slots, num_rows - 1)
    output = ExtendOutput(logits, sample_rows, hidden)
    return cache, Progress(lengths, table), counts, row_params, output


def input_logprobs(
    model: StepModel, layout: ExtendLayout, params: tuple[jax.Array, ...], row_params: RowParams,
    sparse: SparseRows, packed: jax.Array, hidden: jax.Array, *, top: int,
) -> lp.TokenLogprobs:  # fmt: skip
    """Logprobs, at temperature 1, of each packed token's successor, [T, ...].

    hidden [T, D] is the extend step's. The LM head runs on a few hundred rows at a time; chunks in
    which no token is wanted are skipped. Entries of tokens that are not wanted are unspecified.
    """
    batch = layout.unpack(packed)
    owner, offset, valid = locate(batch, layout.tokens)
    wants = valid & (batch.wants_input_logprobs[owner] > 0)
    last = offset == batch.q_lens[owner] - 1
    targets = jnp.where(last, batch.next_tokens[owner], jnp.roll(batch.tokens, -1))
    targets = jnp.maximum(targets, 0)
    slots = batch.slots[owner]
    module = model.bind(params)
    rows = min(INPUT_LOGPROB_ROWS, layout.tokens)
    named_ids = sparse.logprob_ids.shape[1]

    def chunk(i: jax.Array, result: lp.TokenLogprobs) -> lp.TokenLogprobs:
        # the last chunk is moved back to end at T: the overlap is computed twice, and equal
        start = jnp.minimum(i * rows, layout.tokens - rows)

        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, rows)

        def compute() -> lp.TokenLogprobs:
            some_top = jnp.any(part(wants) & (row_params.ints[part(slots), NUM_TOP] > 0))
            named = sparse.logprob_ids[part(slots)]
            logits = module.logits(part(hidden))
            return lp.token_logprobs(logits, part(targets), named, top, some_top)

        neutral = lp.zeros(rows, top, named_ids)
        found = jax.lax.cond(jnp.any(part(wants)), compute, lambda: neutral)
        parts = zip(result, found, strict=True)
        return lp.TokenLogprobs(
            *(jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0) for whole, new in parts)
        )

    result = lp.zeros(layout.tokens, top, named_ids)
    return jax.lax.fori_loop(0, -(-layout.tokens // rows), chunk, result)


def copy_pages(cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
    """Copy whole pages within each layer: sources, targets [C] int32, targets past the end are
    dropped. A fork's last, partly filled prompt page becomes its own this way."""
    return [
        (
            k.at[targets].set(k[sources], mode="drop"),
            v.at[targets].set(v[sources], mode="drop"),
        )
        for k, v in cache
    ]


def install_sparse(
    sparse: SparseRows, slot: jax.Array, bias_ids: jax.Array, bias_values: jax.Array,
    bias_until: jax.Array, logprob_ids: jax.Array,
) -> SparseRows:  # fmt: skip
    """Write one slot's sparse lists."""
    return SparseRows(
        sparse.bias_ids.at[slot].set(bias_ids),
        sparse.bias_values.at[slot].set(bias_values),
        sparse.bias_until.at[slot].set(bias_until),
        sparse.logprob_ids.at[slot].set(logprob_ids),
    )
