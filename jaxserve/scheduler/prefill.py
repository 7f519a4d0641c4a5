"""Packs tokens of several sequences into one extend step. No jax."""

from __future__ import annotations

from jaxserve.batch.batch import ExtendBatch, ExtendRow
from jaxserve.batch.buckets import Buckets, padded_length
from jaxserve.scheduler.sequence import Sequence


class ExtendPlanner:
    """Fills one ExtendBatch. Rows are packed in the order they are added, each sequence starting
    at an aligned row; a sequence that does not fit is cut, and goes on in a later step."""

    def __init__(self, buckets: Buckets, max_tokens: int, max_rows: int | None):
        self._buckets = buckets
        self._max_tokens = padded_length(max_tokens)
        most = buckets.max_extend_rows
        self._max_rows = most if max_rows is None else min(most, max_rows)
        self._rows: list[ExtendRow] = []
        self._forks: list[ExtendRow] = []
        self._packed = 0
        self._copies: list[tuple[int, int]] = []

    @property
    def has_row(self) -> bool:
        return len(self._rows) + len(self._forks) < self._max_rows

    @property
    def has_room(self) -> bool:
        """A further sequence can run at least one token."""
        return self.has_row and self._packed < self._max_tokens

    def add(self, sequence: Sequence) -> None:
        """Pack as many of the sequence's unscheduled tokens as fit, and as its pages reach to, and
        count them as scheduled."""
        start = sequence.kv_len
        room = self._max_tokens - self._packed
        stop = min(sequence.total_tokens, start + room, sequence.capacity)
        samples = stop == sequence.total_tokens
        fresh = start == sequence.reused
        self._rows.append(ExtendRow(sequence, start, stop, self._packed, samples, fresh))
        self._packed += padded_length(stop - start)
        sequence.kv_len = stop

    def completes(self, sequence: Sequence) -> bool:
        """Whether everything known of the sequence is scheduled, so that it can sample."""
        return sequence.kv_len == sequence.total_tokens

    def fork(self, sibling: Sequence, leader: Sequence, copies: list[tuple[int, int]]) -> None:
        """Add a row that samples from the last token of `leader`'s row."""
        row = next(i for i, r in enumerate(self._rows) if r.sequence is leader)
        length = sibling.kv_len
        self._forks.append(ExtendRow(sibling, length, length, 0, True, True, leader=row))
        self._copies += copies

    def batch(self) -> ExtendBatch | None:
        """The filled batch, or None if nothing was added. Its bucket also has a row for each."""
        if not self._rows:
            return None
        rows = (*self._rows, *self._forks)
        tokens = self._buckets.extend_tokens(self._packed)
        while self._buckets.extend_rows(tokens) < len(rows):
            tokens = self._buckets.extend_tokens(tokens + 1)
        row_bucket = self._buckets.extend_rows(tokens)
        return ExtendBatch(rows, tokens, row_bucket, tuple(self._copies))
