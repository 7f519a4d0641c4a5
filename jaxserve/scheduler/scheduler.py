"""What runs next: admission, packing of prefill chunks, decode growth, retraction. No jax.

Prefill goes first: waiting requests are packed into `extend` steps while slots and pages last, then
every running sequence decodes one token a step; several steps are scheduled at once while everybody
has that many tokens to go, and pages for them. When a decode step needs more pages than are free,
the youngest sequences are retracted: they give back their pages, keep their tokens, and are
recomputed later. Results are read up to one step late, so a step may still be in flight for a
sequence; `schedule` then asks for a drain instead of retracting it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from jaxserve.batch.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.batch.buckets import Buckets
from jaxserve.cache.pages import PageAllocator
from jaxserve.request import Request
from jaxserve.scheduler.prefill import ExtendPlanner
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Rows, Slots


class DrainNeeded(Exception):
    """Results in flight must be read before this step can be scheduled."""


class Scheduler:
    """Owns every live sequence and the page allocator.

    waiting: not admitted, oldest first (retracted ones at the front). prefilling: admitted, part of
    the prompt still to run. running: decoding, in the order of a batch's rows. A sequence whose
    last token is scheduled but not read is in none of them, and stays in `live`. slots: progress of
    everything admitted. steps_per_dispatch: decode steps scheduled at once where possible, at most
    the page size.
    """

    def __init__(
        self, *, buckets: Buckets, pages: PageAllocator, page_size: int, max_rows: int,
        max_prefill_tokens: int, max_prefill_rows: int | None = None, steps_per_dispatch: int = 1,
        on_finish: Callable[[Request], object] = lambda request: None,
    ):  # fmt: skip
        """on_finish: called with each request that has left, its outputs complete."""
        self.pages = pages
        self.page_size = page_size
        self.buckets = buckets
        self.waiting: deque[Sequence] = deque()
        self.prefilling: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.live: dict[Request, Sequence] = {}
        self.slots = Slots(max_rows)
        self._rows: Rows | None = None
        self._arrivals = 0
        self._on_finish = on_finish
        self._limits = (min(max_prefill_tokens, buckets.max_tokens), max_prefill_rows)
        self._steps = steps_per_dispatch

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        sequence = Sequence(request, self._arrivals, self.slots)
        self._arrivals += 1
        self.live[request] = sequence
        self.waiting.append(sequence)

    def finish(self, request: Request) -> None:
        """Forget a finished or aborted request; its pages and slot are free at once. A step in
        flight may still write to them: whoever takes them next runs after it on the device."""
        sequence = self.live.pop(request)
        self._drop_from_queues(sequence)
        if sequence.admitted:
            self._release(sequence)
        self._on_finish(request)

    def retract(self, sequence: Sequence) -> None:
        """Take an admitted sequence off the device; it runs again later from its tokens."""
        assert sequence.in_flight == 0, "a retracted sequence's tokens must all have been read"
        self._drop_from_queues(sequence)
        self._release(sequence)
        sequence.request.count_retraction()
        self.waiting.appendleft(sequence)

    def retract_all(self) -> None:
        """After a failure: everything admitted starts over, in the order of arrival. Slots, pages
        and queues are made anew, because the failure may have left them half changed."""
        for sequence in self.live.values():
            if sequence.admitted:
                sequence.drain()
                sequence.request.count_retraction()
                sequence.pages, sequence.slot = [], -1
        self.slots.reset()
        self.pages.reset()
        self.waiting = deque(self.live.values())
        self.prefilling.clear()
        self.running.clear()
        self._rows = None

    @property
    def idle(self) -> bool:
        return not self.live

    # -- one step ---------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None when nothing can run before results in flight are read.

        DrainNeeded: pages are short and somebody who could give some has a step in flight.
        """
        batch = self._schedule_extend()
        return batch if batch is not None else self._schedule_decode()

    def _schedule_extend(self) -> ExtendBatch | None:
        if not self.prefilling and not (self.waiting and self.slots.available):
            return None
        max_tokens, max_rows = self._limits
        planner = ExtendPlanner(self.buckets, max_tokens, max_rows)
        while self.prefilling and planner.has_room:
            sequence = self.prefilling[0]
            planner.add(sequence)
            if planner.completes(sequence):
                self.prefilling.popleft()
                self._begin_decode(sequence)
                self._fork_siblings(sequence, planner)
        while self.waiting and planner.has_room and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            planner.add(sequence)
            if planner.completes(sequence):
                self._begin_decode(sequence)
                self._fork_siblings(sequence, planner)
            else:
                self.prefilling.append(sequence)
        return planner.batch()

    def _schedule_decode(self) -> Batch | None:
        rows, progress = self.rows, self.slots
        # whoever waits now finds no slot or page: all others are admitted and prefilled already
        steps = self._steps
        left = rows.limit - progress.scheduled.take(rows.slots)
        if left.min(initial=steps) < steps:
            complete = left <= 0
            for row in np.flatnonzero(complete).tolist():
                self._leave(rows.sequences[row])
            steps = steps if (left[~complete] >= steps).all() else 1
        new_pages: list[tuple[int, int]] = []
        starved = self._grow(new_pages, steps)
        if starved and steps > 1:
            self._shrink(new_pages)
            steps = 1
            starved = self._grow(new_pages, steps)
        while starved:
            if any(s.in_flight for s in self.live.values()):
                self._shrink(new_pages)
                raise DrainNeeded
            self._shrink(new_pages)
            self.retract(max(self.running, key=lambda s: s.arrival))
            starved = self._grow(new_pages, steps)
        if not self.running:
            return self._schedule_extend()
        rows = self.rows
        progress.advance(rows.slots, steps)
        bucket = self.buckets.decode_rows(len(rows.slots))
        return DecodeBatch(rows, bucket, tuple(new_pages), steps)

    @property
    def rows(self) -> Rows:
        """The running sequences as the rows of a decode step; the same object as long as none
        comes or goes."""
        if self._rows is None:
            self._rows = self.slots.rows(tuple(self.running))
        return self._rows

    def _join(self, sequence: Sequence) -> None:
        self.running[sequence] = None
        self._rows = None

    def _leave(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._rows = None

    # -- pages and slots --------------------------------------------------------------------------

    def _grow(self, new_pages: list[tuple[int, int]], steps: int) -> bool:
        """Give a page to each running sequence whose last one has no room for `steps` tokens, in
        row order. True when pages ran out on the way."""
        slots, sequences = self.rows.slots, self.rows.sequences
        full = self.slots.kv_len.take(slots) + steps > self.slots.capacity.take(slots)
        for row in np.flatnonzero(full).tolist():
            if not self.pages.available:
                return True
            page = self.pages.allocate(1)
            self._hold(sequences[row], page)
            new_pages.append((row, page[0]))
        return False

    def _shrink(self, new_pages: list[tuple[int, int]]) -> None:
        """Take back what `_grow` gave: rows are about to change."""
        sequences = self.rows.sequences
        for row, page in new_pages:
            sequences[row].pages.pop()
            self._hold(sequences[row], [])
            self.pages.release([page])
        new_pages.clear()

    def _hold(self, sequence: Sequence, pages: list[int]) -> None:
        """Add pages to those of a sequence."""
        sequence.pages += pages
        self.slots.capacity[sequence.slot] = len(sequence.pages) * self.page_size

    def _admit(self, sequence: Sequence) -> bool:
        """Reserve a slot and pages for all tokens of `sequence`, leaving a page for each running
        sequence to grow into; False changes nothing."""
        need = -(-sequence.total_tokens // self.page_size)
        reserve = len(self.running) + len(self.prefilling)
        if not self.slots.available or need + reserve > self.pages.available:
            return False
        self._take_slot(sequence)
        self._hold(sequence, self.pages.allocate(need))
        return True

    def _take_slot(self, sequence: Sequence) -> None:
        sequence.slot = self.slots.take(sequence.request)
        if sequence.request.admitted_time is None:
            sequence.request.admitted_time = time.perf_counter()

    def _begin_decode(self, sequence: Sequence) -> None:
        self.slots.scheduled[sequence.slot] += 1
        self._join(sequence)

    def _fork_siblings(self, leader: Sequence, planner: ExtendPlanner) -> None:
        """Let waiting samples of the same prompt share the leader's prompt pages. Those that find
        no slot or page now prefill by themselves later."""
        if not leader.request.group or leader.request.output_ids:
            return
        full, partial = divmod(leader.prompt_len, self.page_size)
        for sibling in self._siblings(leader):
            reserve = len(self.running) + len(self.prefilling)
            enough = self.pages.available >= bool(partial) + reserve
            if not (self.slots.available and enough and planner.has_row):
                return
            self.waiting.remove(sibling)
            self._take_slot(sibling)
            shared = leader.pages[:full]
            self.pages.share(shared)
            own = self.pages.allocate(1 if partial else 0)
            self._hold(sibling, shared + own)
            sibling.kv_len = leader.prompt_len
            copies = [(leader.pages[full], page) for page in own]
            planner.fork(sibling, leader, copies)
            self._begin_decode(sibling)

    def _siblings(self, leader: Sequence) -> Iterator[Sequence]:
        group = leader.request.group
        for sequence in list(self.waiting):
            if sequence.request.group == group and not sequence.request.output_ids:
                yield sequence

    def _release(self, sequence: Sequence) -> None:
        sequence.drain()
        self.pages.release(sequence.pages)
        self.slots.release(sequence.slot)
        sequence.pages = []
        sequence.slot = -1

    def _drop_from_queues(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif not sequence.admitted:
            self.waiting.remove(sequence)
