"""Batches to the few arrays that cross to the device: one int32 vector an extend step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxserve.packing.batch import DecodeBatch, ExtendBatch, ExtendRow
from jaxserve.packing.layout import ROW, ExtendLayout, RowFields
from jaxserve.request import Request
from jaxserve.sampler.fields import FLOATS, INTS


def pack_extend(batch: ExtendBatch, layout: ExtendLayout, padding_slot: int) -> np.ndarray:
    """The packed vector of a batch."""
    packed = np.zeros(layout.size, np.int32)
    buffer = packed.data
    per_token, row_bytes = layout.tokens_of(packed), layout.row_bytes
    fields, ints, floats, page_table = layout.rows_of(packed)
    padding = len(batch.rows)
    fields[padding:] = tuple(RowFields(padding_slot, layout.tokens))
    ints[padding:], floats[padding:] = INTS.neutral, FLOATS.neutral
    last_rows: list[int] = []
    for i, row in enumerate(batch.rows):
        sequence, start, stop, at = row.sequence, row.start, row.stop, row.packed_start
        slot, length = sequence.slot, stop - start
        extras = sequence.request.extras
        last = at + length - 1
        last_rows.append(last)
        if row.leader >= 0:
            leader = last_rows[row.leader]
            sample_at = -1 if sequence.request.apart else leader
            of_row = RowFields(
                slot, layout.tokens, new_lengths=stop, sample_at=sample_at, fresh=row.fresh
            )
        elif row.carried:
            sample_at = -1 if sequence.request.apart else at
            of_row = RowFields(slot, at, length, start, stop, sample_at, carried=1)
        else:
            for field, view in per_token:
                view[..., at : at + length] = field.write(sequence, start, stop)
            wanted = 1 if extras and _wants_prompt_program(row) else 0
            sample_at, follows = -1 if sequence.request.apart else last, -1
            if not row.samples:
                sample_at, follows = -1, sequence.tokens(stop, stop + 1)[0]
            of_row = RowFields(slot, at, length, start, stop, sample_at, row.fresh, follows, wanted)
        numbers = of_row + INTS.read(sequence) + INTS.unread + FLOATS.read(sequence)
        ROW.pack_into(buffer, row_bytes[i], *numbers)
        pages = sequence.pages
        page_table[i, : len(pages)] = pages
        for extra in extras:
            for name, value in extra.fields.items():
                ints[i, INTS.names.index(name)] = value
    return packed


def pack_nobody(layout: ExtendLayout, padding_slot: int) -> np.ndarray:
    """The packed vector of a step that changes nothing but `padding_slot`."""
    packed = pack_extend(ExtendBatch((), layout.tokens, layout.rows), layout, padding_slot)
    fields, *_ = layout.rows_of(packed)
    # every token is some row's, which starts at or before it: here the first one's, of no tokens
    fields[0, RowFields._fields.index("q_starts")] = 0
    return packed


def read_of_prompt(row: ExtendRow) -> set[str]:
    """The payloads that extras read of the prompt tokens in `row`, which runs some."""
    extras = row.sequence.request.extras
    return {extra.name for extra in extras if extra.wants_prompt(row.start, row.stop)}


def _wants_prompt_program(row: ExtendRow) -> bool:
    extras = row.sequence.request.extras
    return any(not x.picked and x.wants_prompt(row.start, row.stop) for x in extras)


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
