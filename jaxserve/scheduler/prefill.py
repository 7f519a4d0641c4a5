"""Packs tokens of several sequences into one extend step. No jax."""

from __future__ import annotations

import math

from jaxserve.packing.batch import ExtendBatch, ExtendRow
from jaxserve.packing.buckets import ALIGNMENT, Buckets, padded_length
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Rows
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.stage import Stage


class ExtendPlanner:
    """Fills one ExtendBatch. Rows are packed in the order they are added, each sequence starting
    at an aligned row; a sequence that does not fit is cut, at a multiple of `alignment` tokens, and
    goes on in a later step.
    """

    def __init__(
        self,
        buckets: Buckets,
        stage: Stage,
        max_tokens: int,
        max_prompts: int | None,
        alignment: int = 1,
        pace: Pace | None = None,
        riders: int = 0,
    ):
        """stage: of prompts' pictures. max_tokens: packed, of the step. max_prompts: sequences with
        tokens to run, None is any number. pace: where given, the step is also limited to its work.
        riders: running sequences for which room is kept."""
        self._buckets = buckets
        self._pace = pace
        self._stage = stage
        self._kept = riders * ALIGNMENT
        most = buckets.max_extend_rows - riders
        self._max_rows = most if max_prompts is None else min(most, max_prompts)
        self._max_tokens = padded_length(max_tokens)
        self._alignment = alignment
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
        """A further sequence can run some tokens, at least up to where it may be cut, within
        `share` of the step; a share that is not all leaves a row to others."""
        rows = len(self._rows) + len(self._forks) + (share < 1)
        tokens = self._packed + max(ALIGNMENT, self._alignment) <= share * self._max_tokens
        return not self._full and rows < self._max_rows and tokens and self._spare_work(share) > 0

    def fits(self, sequence: Sequence, share: float = 1.0) -> bool:
        """Whether all unscheduled tokens of the sequence that its pages reach to fit into `share`
        of the step."""
        left = min(sequence.total_tokens, sequence.capacity) - sequence.most_kv
        room = share * self._max_tokens - self._packed
        return left <= room and self._affords(sequence.most_kv, left, share)

    def add(self, sequence: Sequence, share: float = 1.0) -> None:
        """Pack as many of the sequence's unscheduled tokens as fit into `share` of the step, and as
        its pages reach to, and count them as scheduled. At least a few are, whatever the work: the
        longest context gets on. (None, where there is no room for the pictures of the next.)"""
        start, total = sequence.most_kv, sequence.total_tokens
        reach = stop = min(total, sequence.capacity)
        if not self.fits(sequence, share):
            stop = min(reach, start + self._most(start, share))
        self._full = stop < reach and share == 1
        if stop < total:
            stop -= stop % self._alignment
        if sequence.request.media is not None:
            stop = self._with_pictures(sequence, start, stop, reach)
        count = stop - start
        if not count:
            return
        self._rows.append(
            ExtendRow(
                sequence,
                start,
                stop,
                self._packed,
                samples=stop == total,
                fresh=start == sequence.reused,
                epoch=sequence.epoch,
            )
        )
        self._packed += padded_length(count)
        self._work += padded_length(count) + self._attending(start, count)
        sequence.most_kv = stop

    def _with_pictures(self, sequence: Sequence, start: int, stop: int, reach: int) -> int:
        """How far it can run, given the pictures in its tokens' places."""
        stage, pace, most_patches = self._stage, self._pace, math.inf
        before = stage.patches
        if pace is not None and pace.patch:
            most_patches = before + self._spare_work() / pace.patch
        most = min(reach, start + self._max_tokens - self._packed)
        covered = stage.cover(sequence, start, stop, most, most_patches)
        if covered < min(stop, sequence.total_tokens):
            covered = max(start, covered - covered % self._alignment)
        stage.ran(sequence, covered)
        if pace is not None:
            self._work += pace.patch * (stage.patches - before)
        return covered

    def completes(self, sequence: Sequence) -> bool:
        """Whether everything known of the sequence is scheduled, so that it can sample."""
        return sequence.most_kv == sequence.total_tokens

    def fork(self, sibling: Sequence, leader: Sequence, copies: list[tuple[int, int]]) -> None:
        """Add a row that samples from the last token of `leader`'s row."""
        row = next(i for i, r in enumerate(self._rows) if r.sequence is leader)
        length = sibling.most_kv
        self._forks.append(
            ExtendRow(sibling, length, length, 0, True, True, epoch=sibling.epoch, leader=row)
        )
        self._copies += copies

    def ride(self, rows: Rows) -> None:
        """Add the next token of each running sequence, for which room has been kept and pages are
        there. Comes last."""
        for sequence in rows.sequences:
            length = sequence.most_kv
            self._rows.append(
                ExtendRow(
                    sequence,
                    length,
                    length + 1,
                    self._packed,
                    samples=True,
                    fresh=False,
                    epoch=sequence.epoch,
                    carried=True,
                )
            )
            self._packed += ALIGNMENT

    @property
    def blocked(self) -> bool:
        """Whether there is no room for somebody's next picture."""
        return self._stage.blocked

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
        return ExtendBatch(rows, tokens, row_bucket, tuple(self._copies), self._stage.take())

    def _spare_work(self, share: float = 1.0) -> float:
        return share * self._max_work - self._work

    def _attending(self, start: int, count: int) -> float:
        return 0.0 if self._pace is None else self._pace.attending(start, count)

    def _affords(self, start: int, count: int, share: float) -> bool:
        work = padded_length(count) + self._attending(start, count)
        return work <= self._spare_work(share)

    def _most(self, start: int, share: float) -> int:
        """Tokens behind `start` others for which `share` of the step has room, whole tiles. Where
        work counts, those that are cheapest each: all of a bucket and of a wave is computed, and
        each step has some work of its own."""
        room = (int(share * self._max_tokens) - self._packed) // ALIGNMENT * ALIGNMENT
        pace = self._pace
        if pace is None:
            return room
        around = self._packed + self._kept
        sizes = {room, *range(pace.wave, room, pace.wave)}
        sizes |= {(bucket - around) // ALIGNMENT * ALIGNMENT for bucket in self._buckets.extend}

        def work_each(count: int) -> float:
            bucket = self._buckets.extend_tokens(around + count)
            return (pace.overhead + bucket + pace.attending(start, count)) / count

        def afforded(count: int) -> bool:
            return count <= pace.wave or self._affords(start, count, share)

        return min((n for n in sizes if 0 < n <= room and afforded(n)), key=work_each)
