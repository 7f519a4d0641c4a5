"""Batches to the few arrays that cross to the device: one int32 vector an extend step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxserve.batch.batch import DecodeBatch, ExtendBatch, ExtendRow
from jaxserve.request import Request
from jaxserve.sampler.fields import FLOATS, INTS

ROW_FIELDS = (
    "slots", "q_starts", "q_lens", "prefix_lens", "new_lengths", "sample_at", "fresh",
    "next_tokens", "wants_prompt", "carried",
)  # fmt: skip


class ExtendArrays(NamedTuple):
    """The parts of a packed extend vector; int32 but for `floats`.

    tokens [T]. By row [B]: slots (R: padding), q_starts, q_lens, prefix_lens as paged_prefill has
    them (forks and padding start at T), new_lengths (KV tokens after the step), sample_at (packed
    row whose logits the row samples from, -1: none), fresh (1: the slot's counts restart),
    next_tokens (successor of the row's last token, -1: unknown), wants_prompt (1: an extra reads
    some of its tokens), carried (1: the row's token is the slot's last sample, whatever `tokens`
    says). page_table [B, W]. floats [B, len(FLOATS)], ints [B, len(INTS)]: see sampler.fields.
    """

    tokens: Any
    slots: Any
    q_starts: Any
    q_lens: Any
    prefix_lens: Any
    new_lengths: Any
    sample_at: Any
    fresh: Any
    next_tokens: Any
    wants_prompt: Any
    carried: Any
    page_table: Any
    ints: Any
    floats: Any


@dataclasses.dataclass(frozen=True)
class ExtendLayout:
    """Where each part lies in the packed vector of T tokens, B rows and table width W."""

    tokens: int
    rows: int
    table_width: int

    @property
    def size(self) -> int:
        return self.tokens + self.rows * self._row_width

    @property
    def _row_width(self) -> int:
        return len(ROW_FIELDS) + self.table_width + len(INTS) + len(FLOATS)

    def rows_of(self, packed: Any) -> tuple[Any, Any, Any, Any]:
        """Views into `packed` [size], by row: ROW_FIELDS, page table, ints, floats. Of a NumPy
        vector to fill it, of a traced one to read it."""
        rows = packed[self.tokens :].reshape(self.rows, self._row_width)
        table_from = len(ROW_FIELDS)
        ints_from = table_from + self.table_width
        floats_from = ints_from + len(INTS)
        return (
            rows[:, :table_from], rows[:, table_from:ints_from], rows[:, ints_from:floats_from],
            rows[:, floats_from:].view(np.float32),
        )  # fmt: skip

    def unpack(self, packed: Any) -> ExtendArrays:
        """Views into `packed` [size], by name."""
        fields, page_table, ints, floats = self.rows_of(packed)
        columns = (fields[:, i] for i in range(len(ROW_FIELDS)))
        return ExtendArrays(
            packed[: self.tokens], *columns, page_table=page_table, ints=ints, floats=floats
        )


def pack_extend(batch: ExtendBatch, layout: ExtendLayout, padding_slot: int) -> np.ndarray:
    """The packed vector of a batch."""
    packed = np.zeros(layout.size, np.int32)
    fields, page_table, ints, floats = layout.rows_of(packed)
    padding = len(batch.rows)
    fields[padding:] = (padding_slot, layout.tokens, 0, 0, 0, -1, 0, -1, 0, 0)
    ints[:], floats[:] = INTS.neutral, FLOATS.neutral
    last_rows = []
    for i, row in enumerate(batch.rows):
        sequence, start, at = row.sequence, row.start, row.packed_start
        request, length = sequence.request, row.stop - start
        last_rows.append(at + length - 1)
        sample_at = next_token = -1
        wanted = False
        if row.leader >= 0:
            at, length, start, sample_at = layout.tokens, 0, 0, last_rows[row.leader]
        elif row.carried:
            sample_at = at
        else:
            packed[at : at + length] = sequence.tokens(start, row.stop)
            wanted = bool(request.extras and read_of_prompt(row))
            if row.samples:
                sample_at = last_rows[i]
            else:
                next_token = sequence.tokens(row.stop, row.stop + 1)[0]
        # One assignment a row, in the order of ROW_FIELDS: each has its price.
        fields[i] = (
            sequence.slot, at, length, start, row.stop, sample_at, row.fresh, next_token, wanted,
            row.carried,
        )  # fmt: skip
        page_table[i, : len(sequence.pages)] = sequence.pages
        ints[i, : INTS.read_count], floats[i] = INTS.read(sequence), FLOATS.read(sequence)
        for extra in request.extras:
            for name, value in extra.fields.items():
                ints[i, INTS.names.index(name)] = value
    return packed


def read_of_prompt(row: ExtendRow) -> set[str]:
    """The payloads that extras read of the prompt tokens in `row`, which runs some."""
    extras = row.sequence.request.extras
    return {extra.name for extra in extras if extra.wants_prompt(row.start, row.stop)}


class SparseArrays(NamedTuple):
    """One slot's lists, see sampler.state.SparseRows."""

    bias_ids: np.ndarray
    bias_values: np.ndarray
    bias_until: np.ndarray
    logprob_ids: np.ndarray


def pack_sparse(request: Request, bias_capacity: int, max_ids: int) -> SparseArrays | None:
    """The slot's lists, or None for a request that has none. Named ids that are more than `max_ids`
    are not in them: see step.wide."""
    bias = request.params.logit_bias or {}
    named = request.named_ids
    if len(named) > max_ids:
        named = ()
    if not bias and not request.masked_ids and not named:
        return None
    count, total = len(bias), len(bias) + len(request.masked_ids)
    ids = np.zeros(bias_capacity, np.int32)
    values = np.zeros(bias_capacity, np.float32)
    until = np.zeros(bias_capacity, np.int32)
    ids[:total] = [*bias, *request.masked_ids]
    values[:count] = list(bias.values())
    values[count:total] = -np.inf
    until[:count] = np.iinfo(np.int32).max
    until[count:total] = len(request.prompt_ids) + request.params.min_new_tokens
    logprob_ids = np.zeros(max_ids, np.int32)
    logprob_ids[: len(named)] = named
    return SparseArrays(ids, values, until, logprob_ids)


def pack_decode(batch: DecodeBatch, padding_slot: int) -> np.ndarray:
    """[2, B] int32 of a decode batch: slots, and the page each row begins (-1 for none)."""
    upload = np.empty((2, batch.row_bucket), np.int32)
    upload[0] = padding_slot
    upload[0, : len(batch.sequences)] = batch.rows.slots
    upload[1] = -1
    for row, page in batch.new_pages:
        upload[1, row] = page
    return upload
