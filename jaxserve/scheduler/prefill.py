"""Packs tokens of several sequences into one extend step. No jax."""

from __future__ import annotations

import math

from jaxserve.batch.batch import ExtendBatch, ExtendRow
from jaxserve.batch.buckets import ALIGNMENT, Buckets, padded_length
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Rows


class ExtendPlanner:
    """Fills one ExtendBatch. Rows are packed in the order they are added, each sequence starting
    at an aligned row; a sequence that does not fit is cut, and goes on in a later step.

    max_tokens: packed, of the step. max_prompts: sequences with tokens to run. pace: where given,
    the step is also limited to its work. riders: running sequences for which room is kept.
    """

    def __init__(
        self, buckets: Buckets, max_tokens: int, max_prompts: int | None,
        pace: Pace | None = None, riders: int = 0,
    ):  # fmt: skip
        self._buckets = buckets
        self._pace = pace
        self._kept = riders * ALIGNMENT
        most = buckets.max_extend_rows - riders
        self._max_rows = most if max_prompts is None else min(most, max_prompts)
        self._max_tokens = padded_length(max_tokens)
        self._max_work = math.inf
        if pace is not None:
            self._max_tokens = min(self._max_tokens, padded_length(pace.work))
            self._max_work = pace.work - self._kept
        self._max_tokens -= self._kept
        self._rows: list[ExtendRow] = []
        self._forks: list[ExtendRow] = []
        self._packed = 0
        self._work = 0.0
        self._full = False
        self._copies: list[tuple[int, int]] = []

    @property
    def has_row(self) -> bool:
        return len(self._rows) + len(self._forks) < self._max_rows

    def has_room(self, share: float = 1.0) -> bool:
        """A further sequence can run some tokens within `share` of the step; a share that is not
        all leaves a row to others."""
        rows = len(self._rows) + len(self._forks) + (share < 1)
        tokens = self._packed + ALIGNMENT <= share * self._max_tokens
        return not self._full and rows < self._max_rows and tokens and self._spare_work(share) > 0

    def fits(self, sequence: Sequence) -> bool:
        """Whether all unscheduled tokens of the sequence fit."""
        left = sequence.total_tokens - sequence.kv_len
        work = padded_length(left) + self._attending(sequence.kv_len, left)
        return left <= self._max_tokens - self._packed and work <= self._spare_work()

    def add(self, sequence: Sequence, share: float = 1.0) -> None:
        """Pack as many of the sequence's unscheduled tokens as fit into `share` of the step, and
        count them as scheduled. At least a few are, whatever the work: the longest context gets
        on."""
        start, total = sequence.kv_len, sequence.total_tokens
        count = min(total - start, self._longest(start, share))
        if start + count < total and share == 1:
            count = self._worth(start, count)
            self._full = True
        stop = start + count
        self._rows.append(
            ExtendRow(
                sequence, start, stop, self._packed, samples=stop == total,
                fresh=start == sequence.reused, epoch=sequence.epoch,
            )
        )  # fmt: skip
        self._packed += padded_length(count)
        self._work += padded_length(count) + self._attending(start, count)
        sequence.kv_len = stop

    def completes(self, sequence: Sequence) -> bool:
        """Whether everything known of the sequence is scheduled, so that it can sample."""
        return sequence.kv_len == sequence.total_tokens

    def fork(self, sibling: Sequence, leader: Sequence, copies: list[tuple[int, int]]) -> None:
        """Add a row that samples from the last token of `leader`'s row."""
        row = next(i for i, r in enumerate(self._rows) if r.sequence is leader)
        length = sibling.kv_len
        self._forks.append(
            ExtendRow(sibling, length, length, 0, True, True, epoch=sibling.epoch, leader=row)
        )
        self._copies += copies

    def ride(self, rows: Rows) -> None:
        """Add the next token of each running sequence, for which room has been kept and pages are
        there. Comes last."""
        for sequence in rows.sequences:
            length = sequence.kv_len
            self._rows.append(
                ExtendRow(
                    sequence, length, length + 1, self._packed, samples=True, fresh=False,
                    epoch=sequence.epoch, carried=True,
                )
            )  # fmt: skip
            self._packed += ALIGNMENT

    @property
    def empty(self) -> bool:
        return not self._rows

    def batch(self) -> ExtendBatch:
        """The filled batch, which is not empty. Its bucket also has a row for each."""
        rows = (*self._rows, *self._forks)
        tokens = self._buckets.extend_tokens(self._packed)
        while self._buckets.extend_rows(tokens) < len(rows):
            tokens = self._buckets.extend_tokens(tokens + 1)
        row_bucket = self._buckets.extend_rows(tokens)
        return ExtendBatch(rows, tokens, row_bucket, tuple(self._copies))

    def _spare_work(self, share: float = 1.0) -> float:
        return share * self._max_work - self._work

    def _attending(self, start: int, count: int) -> float:
        return 0.0 if self._pace is None else self._pace.attending(start, count)

    def _longest(self, start: int, share: float) -> int:
        """Most tokens behind `start` others that `share` of the step has room for, whole tiles."""
        room = int(share * self._max_tokens) - self._packed
        if self._pace is not None:
            room = min(room, self._pace.longest(start, max(self._spare_work(share), 0)))
        return max(room - room % ALIGNMENT, ALIGNMENT)

    def _worth(self, start: int, count: int) -> int:
        """`count` tokens, or as many fewer as fill a smaller bucket, if those are cheaper each: all
        of a bucket is computed, and each step has some work of its own."""
        if self._pace is None:
            return count
        around = self._packed + self._kept
        smaller = [tokens for tokens in self._buckets.extend if tokens < around + count]
        if not smaller or smaller[-1] < around + ALIGNMENT:
            return count
        own = self._pace.work / 8

        def work_each(count: int) -> float:
            bucket = self._buckets.extend_tokens(around + count)
            return (own + bucket + self._attending(start, count)) / count

        return min(count, (smaller[-1] - around) // ALIGNMENT * ALIGNMENT, key=work_each)
