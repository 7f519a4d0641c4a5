"""What runs next: admission, packing of prefill chunks, decode growth, retraction. No jax.

Prefill goes first: waiting requests are packed into `extend` steps while slots and pages last, then
every running sequence decodes a token a step, or several. But where a running request streams, or a
prompt takes several whole steps, running sequences get a token with each extend step: it rides in
it if they are few, else a decode step follows; and where one streams, extend steps are short
(`Pace`). A sequence begins behind the longest cached prefix; its own prompt can be reused as soon
as it is scheduled, even in the same step. When a decode step needs more pages than are available,
the sequences of the lowest priority, and of those the youngest, are retracted: they leave their
pages to the prefix cache, keep their tokens, and go on later. Results are read up to one step late,
so a step may be in flight for a sequence; `schedule` then asks for a drain instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

import numpy as np

from jaxserve.cache.host import HostPages
from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.prefix import PrefixCache
from jaxserve.cache.window import Window
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.packing.buckets import Ready
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Rows, Slots
from jaxserve.request import Request
from jaxserve.scheduler.admission import Admission
from jaxserve.scheduler.mixing import Mixing
from jaxserve.scheduler.policy import WaitingQueue
from jaxserve.scheduler.preempt import Preemption
from jaxserve.scheduler.prefill import ExtendPlanner
from jaxserve.scheduler.running import Running
from jaxserve.scheduler.scheduling import Scheduling
from jaxserve.scheduler.stage import Stage

PASSING = 0.5
"""The share of a step that shorter prompts may take from one that needs several."""
PASSING_WINDOW = 8
"""How many of the queue are looked at for such prompts."""


class DrainNeeded(Exception):
    """Results in flight must be read before this step can be scheduled."""


class Scheduler:
    """Owns every live sequence and the pages. A sequence waits, or prefills, or runs; when its last
    token is scheduled but not read, it does none of these."""

    def __init__(
        self,
        scheduling: Scheduling,
        pages: PageAllocator,
        *,
        window: Window | None = None,
        host: HostPages | None = None,
        ready: Callable[[], Ready] | None = None,
        on_finish: Callable[[Request], object] = lambda request: None,
    ):
        """window: of the model, if none of its layers sees further and the pool holds it and one
        aligned chunk. host: the memory for evicted pages; its copies are to be made before each
        step. ready: what can run, asked each step; None: everything. on_finish: called with each
        request that has left, its outputs complete."""
        self.policy = scheduling.policy
        self.page_size = scheduling.page_size
        self.pages = PrefixCache(pages, self.page_size, scheduling.eviction, host)
        self.waiting = WaitingQueue()
        """Not admitted, retracted ones among them."""
        self.prefilling: deque[Sequence] = deque()
        """Admitted, part of the prompt still to run."""
        self.live: dict[Request, Sequence] = {}
        """All, until their requests end."""
        self.slots = Slots(scheduling.max_rows, scheduling.pending, scheduling.replays)
        """Progress of everything admitted."""
        self.running = Running(self.slots)
        """Decoding."""
        self.stage = Stage(scheduling.media_rows)
        """Of prompts' pictures."""
        self.admission = Admission(
            self.pages,
            self.slots,
            self.stage,
            self.page_size,
            self.policy.conservativeness,
            scheduling.chunk_alignment,
            window,
            chunk=scheduling.extend_tokens,
        )
        self._scheduling = scheduling
        everything = Ready.everything(scheduling.buckets)
        self._ready = ready or (lambda: everything)
        self._mixing = Mixing(scheduling, self.running, self.slots, self.admission)
        self._preemption = Preemption(self.policy.threshold, self.running, self.admission)
        self._arrivals = 0
        self._on_finish = on_finish
        self._decode_is_next = False
        self._refused: object = None

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
        sequence.request.count_retraction()
        self.waiting.add(sequence)

    def settle(self, rows: Rows, missing: np.ndarray) -> None:
        """A decode step of `rows` has been read and committed. missing [>= n]: how many tokens
        fewer than scheduled each made. Not where windows slide (pages that the next token sees
        may have gone), nor where running rows ride in extend steps (their place is packed on the
        host): such steps make all that they have room for, or are read before the next."""
        missing = missing[: len(rows.slots)]
        alive = self.slots.epoch[rows.slots] == rows.epochs
        short = np.flatnonzero(alive & (missing > 0))
        self.slots.settle(rows.slots[short], missing[short])
        for row in short.tolist():  # whose last token had seemed to be scheduled
            if rows.sequences[row] not in self.running:
                self.running.join(rows.sequences[row])

    def retract_all(self) -> None:
        """After a failure: everything admitted starts over, in the order of arrival. Slots, pages,
        prefixes and queues are made anew, because the failure may have left them half changed."""
        self.waiting = WaitingQueue()
        for sequence in self.live.values():
            if sequence.admitted:
                sequence.drain()
                sequence.request.count_retraction()
                sequence.pages, sequence.slot, sequence.dropped = [], -1, 0
            sequence.lease = sequence.lease.none()
            self.waiting.add(sequence)
        self.slots.reset()
        self.pages.reset()
        self.stage.reset()
        self.prefilling.clear()
        self.running.clear()
        self._preemption.reset()
        self._refused = None

    def forget_prefixes(self) -> None:
        """Empty the prefix cache. What is admitted keeps its pages, for itself."""
        self.pages.clear()
        self.stage.forget()
        for sequence in self.live.values():
            sequence.lease = sequence.lease.none()

    @property
    def idle(self) -> bool:
        return not self.live

    # -- one step ---------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None when nothing can run before results in flight are read.

        DrainNeeded: pages are short and somebody who could give some has a step in flight.
        """
        batch = None
        self.stage.begin_step()
        if not (self._decode_is_next and self.running):
            batch = self._schedule_extend()
        if batch is None:
            batch = self._schedule_decode()
            self._decode_is_next = False
        return batch

    def _schedule_extend(self) -> ExtendBatch | None:
        if self.policy.priorities and self.waiting:
            for victim in self._preemption.victims(self.waiting, self._circumstances):
                if self.slots.in_flight:
                    raise DrainNeeded
                self.retract(victim)
        if not self.prefilling and not self._may_admit:
            return None
        scheduling, mixing = self._scheduling, self._mixing
        expectant = mixing.expectant(self.prefilling)
        pace = scheduling.pace if expectant is not None and expectant.watched else None
        riders = mixing.riders(expectant, pace)
        planner = ExtendPlanner(
            self._ready().buckets,
            self.stage,
            scheduling.extend_tokens,
            scheduling.max_prefill_rows,
            scheduling.chunk_alignment,
            pace,
            len(riders.slots) if riders else 0,
        )
        self._extend_admitted(planner)
        if self._may_admit and planner.has_room():
            self._extend_waiting(planner)
        if planner.empty:
            return None
        ridden = riders is not None and mixing.ride(riders, planner)
        self._decode_is_next = expectant is not None and not ridden
        return planner.batch()

    def _extend_admitted(self, planner: ExtendPlanner) -> None:
        """Pack what is left of admitted prompts, a chunk of each: one may be cut where its pages
        end, before the step is full."""
        for sequence in list(self.prefilling):
            if not planner.has_room():
                return
            self.admission.advance(sequence)
            passed = self._scheduling.pace is not None and not planner.fits(sequence)
            if passed:
                self._let_pass(sequence, planner)
            if self._extend(sequence, planner):
                self.prefilling.remove(sequence)
            if passed:  # it took what was left, and others of the list have had their chunk
                return

    def _let_pass(self, long: Sequence, planner: ExtendPlanner) -> None:
        """Pack prompts that are much shorter than what is left of `long`, into a part of the step:
        admitted ones, then waiting ones, which may overtake longer ones but nobody who finds no
        room."""
        for sequence in [s for s in self.prefilling if s is not long]:
            if planner.has_room(PASSING) and self._extend(sequence, planner, PASSING):
                self.prefilling.remove(sequence)
        left = long.total_tokens - long.most_kv
        most = min(self._scheduling.extend_tokens, left // 2)
        for sequence in list(islice(self.waiting, PASSING_WINDOW)):
            if not (self.slots.available and planner.has_room(PASSING)):
                return
            if sequence.admitted or self.admission.to_run(sequence, most) > most:
                continue
            if not self.admission.admit(sequence):
                return
            self.waiting.remove(sequence)
            if not self._extend(sequence, planner, PASSING):
                self.prefilling.append(sequence)

    def _extend_waiting(self, planner: ExtendPlanner) -> None:
        """Admit and pack waiting sequences, up to the first for which there is no room."""
        if self.policy.schedule == "lpm":
            self.waiting.prefer(self.admission.cached_pages)
        while self.waiting and planner.has_room() and not planner.blocked:
            sequence = self.waiting.first()
            if not self.admission.admit(sequence):
                self._refused = self._circumstances
                return
            self.waiting.remove(sequence)
            if not self._extend(sequence, planner):
                self.prefilling.append(sequence)

    def _extend(self, sequence: Sequence, planner: ExtendPlanner, share: float = 1.0) -> bool:
        """Pack what fits of an admitted sequence; whether that completes it."""
        self.admission.advance(sequence)
        planner.add(sequence, share)
        self.admission.publish(sequence)
        if not planner.completes(sequence):
            return False
        self._begin_decode(sequence)
        self._fork_siblings(sequence, planner)
        return True

    def _schedule_decode(self) -> Batch | None:
        steps = self._scheduling.steps_per_dispatch
        if steps > 1 and (self.prefilling or self._may_admit):
            steps = 1
        steps = steps if self.running.drop_complete(steps) >= steps else 1
        rows, new_pages, ready = self.rows, [], self._ready()
        bucket = ready.buckets.decode_rows(len(rows.slots))
        several = bool(rows.fused) if rows.parts else bucket in ready.several
        steps = steps if several else 1
        starved = self.admission.grow(rows, new_pages, steps)
        if starved and steps > 1:
            self.admission.shrink(rows, new_pages)
            steps = 1
            starved = self.admission.grow(rows, new_pages, steps)
        while starved:
            self.admission.shrink(rows, new_pages)
            if self.slots.in_flight:
                raise DrainNeeded
            self.retract(max((*self.running, *self.prefilling), key=lambda s: s.order))
            rows = self.rows
            starved = self.admission.grow(rows, new_pages, steps)
        if not self.running:
            return self._schedule_extend()
        self.slots.advance(rows.slots, steps)
        bucket = ready.buckets.decode_rows(len(rows.slots))
        return DecodeBatch(rows, bucket, tuple(new_pages), steps)

    @property
    def rows(self) -> Rows:
        """The running sequences as the rows of a decode step."""
        return self.running.rows

    def _begin_decode(self, sequence: Sequence) -> None:
        self.slots.most_scheduled[sequence.slot] += 1
        self.running.join(sequence)

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
        return self._refused is None or self._refused != self._circumstances

    @property
    def _circumstances(self) -> object:
        return self.waiting.version, self.admission.version

    def _drop_from_queues(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.leave(sequence)
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif not sequence.admitted:
            self.waiting.remove(sequence)
