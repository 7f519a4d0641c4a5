"""What an extend step is told of its tokens and rows: one int32 vector, declared field by field. No
jax."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxserve.packing.sequence import Sequence
from jaxserve.sampler.fields import FLOATS, INTS


class TokenField(NamedTuple):
    """A number of each packed token, or several."""

    name: str
    write: Callable[[Sequence, int, int], Any]
    """(sequence, start, stop) -> int32 [*lead, stop - start] of its positions start..stop-1. (Of
    float32 values, their bits.)"""
    lead: tuple[int, ...] = ()
    """Dimensions before T."""


TOKEN_FIELDS = (TokenField("tokens", Sequence.tokens),)
"""Of every token that a row runs; padding and carried rows have 0.

`tokens`: ids. Positions are not among them: the device derives them from the rows, and where a
token is in the cache always follows from that. A field `positions` would say instead how tokens
are rotated (`step.extend_step`).
"""


class RowFields(NamedTuple):
    """What a step knows of a row: numbers of one row, or columns [B] of all. The defaults are those
    of padding."""

    slots: Any
    """R for padding."""
    q_starts: Any
    """The row's first packed token; T for padding and forks, which run none."""
    q_lens: Any = 0
    """How many tokens it runs."""
    prefix_lens: Any = 0
    """Tokens before those: the first one's position."""
    new_lengths: Any = 0
    """Tokens with KV after the step."""
    sample_at: Any = -1
    """Packed token whose logits the row samples from, -1 for none."""
    fresh: Any = 0
    """1: the slot's counts restart."""
    next_tokens: Any = -1
    """Successor of the row's last token, -1: unknown."""
    wants_prompt: Any = 0
    """1: an extra reads some of its tokens by a program (not their hidden states)."""
    carried: Any = 0
    """1: its token is the slot's last sample, whatever `tokens` says."""


ROW = struct.Struct(f"={len(RowFields._fields)}i{len(INTS)}i{len(FLOATS)}f")
"""A row's RowFields, ints and floats, as its part of the vector begins. (All at once they cost half
of what they do as three assignments to arrays.)"""


class ExtendArrays(NamedTuple):
    """The parts of a packed extend vector; int32 but for `floats`."""

    per_token: Mapping[str, Any]
    """By the names of TOKEN_FIELDS: [*lead, T]."""
    rows: RowFields
    """Columns [B]."""
    ints: Any
    """[B, len(INTS)], see sampler.fields."""
    floats: Any
    """[B, len(FLOATS)]."""
    page_table: Any
    """[B, W]."""


@dataclasses.dataclass(frozen=True)
class ExtendLayout:
    """Where each part lies in the packed vector."""

    tokens: int
    """T."""
    rows: int
    """B."""
    table_width: int
    """W."""
    fields: tuple[TokenField, ...] = TOKEN_FIELDS

    @functools.cached_property
    def size(self) -> int:
        """Numbers of the whole vector."""
        numbers = sum(math.prod(field.lead) for field in self.fields)
        return self.tokens * numbers + self.rows * self._row_width

    @functools.cached_property
    def _row_width(self) -> int:
        return ROW.size // 4 + self.table_width

    @functools.cached_property
    def _row_parts(self) -> tuple[slice, ...]:
        """Of a row: its RowFields, ints, floats and page table."""
        widths = (len(RowFields._fields), len(INTS), len(FLOATS), self.table_width)
        ends = [0, *itertools.accumulate(widths)]
        return tuple(slice(*pair) for pair in itertools.pairwise(ends))

    @functools.cached_property
    def row_bytes(self) -> range:
        """Where each row begins, in bytes."""
        size = 4 * self._row_width
        return range(4 * self.size - self.rows * size, 4 * self.size, size)

    def tokens_of(self, packed: Any) -> list[tuple[TokenField, Any]]:
        """Each field and its view into `packed` [size]: [*lead, T]. Of a NumPy vector to fill it,
        of a traced one to read it."""
        views, start = [], 0
        for field in self.fields:
            stop = start + self.tokens * math.prod(field.lead)
            view = packed[start:stop]
            views.append((field, view.reshape(*field.lead, self.tokens) if field.lead else view))
            start = stop
        return views

    def rows_of(self, packed: Any) -> tuple[Any, Any, Any, Any]:
        """Views into `packed` [size], by row: RowFields, ints, floats, page table."""
        width = self._row_width
        rows = packed[self.size - self.rows * width :].reshape(self.rows, width)
        fields, ints, floats, table = self._row_parts
        return rows[:, fields], rows[:, ints], rows[:, floats].view(np.float32), rows[:, table]

    def unpack(self, packed: Any) -> ExtendArrays:
        """Views into `packed` [size], by name."""
        fields, ints, floats, page_table = self.rows_of(packed)
        columns = RowFields(*(fields[:, i] for i in range(len(RowFields._fields))))
        per_token = {field.name: view for field, view in self.tokens_of(packed)}
        return ExtendArrays(per_token, columns, ints, floats, page_table)
