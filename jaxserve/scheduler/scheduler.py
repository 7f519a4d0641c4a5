"""What runs next: admission, packing of prefill chunks, decode growth, retraction. No jax.

Prefill goes first: waiting requests are packed into `extend` steps while slots and pages last, then
every running sequence decodes one token a step; several steps are scheduled at once while everybody
has that many tokens to go, and pages for them. A sequence begins behind the longest prefix that is
cached, and its own prompt can be reused as soon as it is scheduled, even in the same step. When a
decode step needs more pages than are available, the sequences of the lowest priority, and of those
the youngest, are retracted: they leave their pages to the prefix cache, keep their tokens, and go
on later. Results are read up to one step late, so a step may still be in flight for a sequence;
`schedule` then asks for a drain instead of retracting it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from jaxserve.batch.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.batch.buckets import Buckets
from jaxserve.cache.host import HostPages
from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.prefix import Lease, PrefixCache
from jaxserve.cache.window import Window
from jaxserve.request import Request
from jaxserve.scheduler.admission import Admission
from jaxserve.scheduler.policy import Policy, WaitingQueue
from jaxserve.scheduler.prefill import ExtendPlanner
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Rows, Slots


class DrainNeeded(Exception):
    """Results in flight must be read before this step can be scheduled."""


class Scheduler:
    """Owns every live sequence and the pages.

    waiting: not admitted, retracted ones among them. prefilling: admitted, part of
    the prompt still to run. running: decoding, in the order of a batch's rows. A sequence whose
    last token is scheduled but not read is in none of them, and stays in `live`. slots: progress of
    everything admitted. steps_per_dispatch: decode steps scheduled at once where possible, at most
    the page size.
    """

    def __init__(
        self, *, buckets: Buckets, pages: PageAllocator, page_size: int, max_rows: int,
        max_prefill_tokens: int, max_prefill_rows: int | None = None, steps_per_dispatch: int = 1,
        policy: Policy | None = None, eviction: str | None = "lru", window: Window | None = None,
        host: HostPages | None = None,
        on_finish: Callable[[Request], object] = lambda request: None,
    ):  # fmt: skip
        """eviction: the prefix cache's policy, None for no prefix cache. window: of the model, if
        none of its layers sees further. host: the memory for evicted pages; its copies are to be
        made before each step. on_finish: called with each request that has left, its outputs
        complete."""
        self.policy = policy or Policy()
        self.pages = PrefixCache(pages, page_size, eviction, host)
        self.page_size = page_size
        self.buckets = buckets
        self.waiting = WaitingQueue()
        self.prefilling: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.live: dict[Request, Sequence] = {}
        self.slots = Slots(max_rows)
        self.admission = Admission(
            self.pages, self.slots, page_size, self.policy.conservativeness, window,
            chunk=min(max_prefill_tokens, buckets.max_tokens),
        )  # fmt: skip
        self._rows: Rows | None = None
        self._arrivals = 0
        self._on_finish = on_finish
        self._limits = (min(max_prefill_tokens, buckets.max_tokens), max_prefill_rows)
        self._steps = steps_per_dispatch
        self._refused: object = None
        self._no_victims: object = None

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        rank = self.policy.rank(request)
        sequence = Sequence(request, self._arrivals, self.slots, rank)
        self._arrivals += 1
        self.live[request] = sequence
        self.waiting.add(sequence)

    def finish(self, request: Request) -> None:
        """Forget a finished or aborted request; its pages and slot can be taken at once. A step in
        flight may still write to them: whoever takes them next runs after it on the device."""
        sequence = self.live.pop(request)
        self._drop_from_queues(sequence)
        if sequence.admitted:
            self.admission.release(sequence)
        self._on_finish(request)

    def retract(self, sequence: Sequence) -> None:
        """Take an admitted sequence off the device; it runs again later from its tokens."""
        assert sequence.in_flight == 0, "a retracted sequence's tokens must all have been read"
        self._drop_from_queues(sequence)
        self.admission.release(sequence)
        sequence.request.num_retractions += 1
        if sequence.request.input_logprobs is None:
            sequence.request.pending_input_logprobs.clear()
        self.waiting.add(sequence)

    def retract_all(self) -> None:
        """After the device lost its KV: everything admitted starts over."""
        for sequence in [s for s in self.live.values() if s.admitted]:
            self.slots.scheduled[sequence.slot] = self.slots.produced[sequence.slot]
            self.retract(sequence)
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache. What is admitted keeps its pages, for itself."""
        self.pages.clear()
        for sequence in self.live.values():
            sequence.lease = Lease(sequence.request.cache_salt)

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
        if self.policy.priorities and self.waiting:
            self._preempt()
        if not self.prefilling and not self._may_admit:
            return None
        max_tokens, max_rows = self._limits
        planner = ExtendPlanner(self.buckets, max_tokens, max_rows)
        for sequence in list(self.prefilling):  # a chunk of each, at most
            if planner.has_room and self._extend(sequence, planner):
                self.prefilling.remove(sequence)
        if self._may_admit and planner.has_room:
            self._extend_waiting(planner)
        return planner.batch()

    def _extend_waiting(self, planner: ExtendPlanner) -> None:
        """Admit and pack waiting sequences, up to the first for which there is no room."""
        if self.policy.schedule == "lpm":
            self.waiting.prefer(self.admission.cached_pages)
        while self.waiting and planner.has_room:
            sequence = self.waiting.first()
            if not self.admission.admit(sequence):
                self._refused = self._circumstances
                return
            self.waiting.remove(sequence)
            if not self._extend(sequence, planner):
                self.prefilling.append(sequence)

    def _extend(self, sequence: Sequence, planner: ExtendPlanner) -> bool:
        """Pack what fits of an admitted sequence; whether that completes it."""
        self.admission.advance(sequence)
        planner.add(sequence)
        self.admission.publish(sequence)
        if not planner.completes(sequence):
            return False
        self._begin_decode(sequence)
        self._fork_siblings(sequence, planner)
        return True

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
            if self.slots.in_flight:
                self._shrink(new_pages)
                raise DrainNeeded
            self._shrink(new_pages)
            self.retract(max(self.running, key=lambda s: s.order))
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

    # -- pages ------------------------------------------------------------------------------------

    def _grow(self, new_pages: list[tuple[int, int]], steps: int) -> bool:
        """Give a page to each running sequence whose last one has no room for `steps` tokens, in
        row order. True when pages ran out on the way."""
        slots, sequences = self.rows.slots, self.rows.sequences
        full = self.slots.kv_len.take(slots) + steps > self.slots.capacity.take(slots)
        for row in np.flatnonzero(full).tolist():
            self.admission.slide(sequences[row])
            if not self.pages.available:
                return True
            page = self.pages.allocate(1)
            self.admission.hold(sequences[row], page)
            new_pages.append((row, page[0]))
        return False

    def _shrink(self, new_pages: list[tuple[int, int]]) -> None:
        """Take back what `_grow` gave: rows are about to change."""
        sequences = self.rows.sequences
        for row, page in new_pages:
            sequences[row].pages.pop()
            self.admission.hold(sequences[row], [])
            self.pages.release([page])
        new_pages.clear()

    def _begin_decode(self, sequence: Sequence) -> None:
        self.slots.scheduled[sequence.slot] += 1
        self._join(sequence)

    def _fork_siblings(self, leader: Sequence, planner: ExtendPlanner) -> None:
        """Let waiting samples of the same prompt share the leader's prompt pages. Those that find
        no slot or page now prefill by themselves later."""
        if not leader.request.group or leader.request.output_ids:
            return
        for sibling in self.waiting.siblings(leader.request.group):
            if sibling.request.output_ids:
                continue
            copies = self.admission.fork(sibling, leader) if planner.has_row else None
            if copies is None:
                return
            self.waiting.remove(sibling)
            planner.fork(sibling, leader, copies)
            self._begin_decode(sibling)

    # -- who may run ------------------------------------------------------------------------------

    @property
    def _may_admit(self) -> bool:
        """Whether somebody waits for whom there may be room: not if the first was refused and
        nothing has been given back, cached or queued since."""
        if not (self.waiting and self.slots.available):
            return False
        return self._refused != self._circumstances

    @property
    def _circumstances(self) -> object:
        return self.waiting.version, self.admission.version

    def _preempt(self) -> None:
        """Retract running sequences, the last in the order first, until the first of the queue has
        room; only those whose priority is worse by more than the threshold."""
        circumstances = (self._circumstances, len(self.running))
        if self._no_victims == circumstances:
            return
        first = self.waiting.first()
        victims = [s for s in self.running if s.rank - first.rank > self.policy.threshold]
        victims.sort(key=lambda s: s.order)
        if not victims:
            self._no_victims = circumstances
        while victims and not self.admission.has_room(first):
            if self.slots.in_flight:
                raise DrainNeeded
            self.retract(victims.pop())

    def _drop_from_queues(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif not sequence.admitted:
            self.waiting.remove(sequence)
