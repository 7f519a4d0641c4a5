"""Running sequences while prompts come in. No jax."""

from __future__ import annotations

from collections import deque

from jaxserve.packing.buckets import ALIGNMENT
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Rows, Slots
from jaxserve.scheduler.admission import Admission
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.prefill import ExtendPlanner
from jaxserve.scheduler.running import Running
from jaxserve.scheduler.scheduling import Scheduling


class Mixing:
    """Who gets a token with an extend step, and whether as a row of it. With pace None nobody."""

    def __init__(
        self, scheduling: Scheduling, running: Running, slots: Slots, admission: Admission
    ) -> None:
        self._pace = scheduling.pace
        self._tokens = scheduling.extend_tokens
        self._most_rows = scheduling.buckets.max_extend_rows
        self._running = running
        self._slots = slots
        self._admission = admission

    def expectant(self, prefilling: deque[Sequence]) -> Rows | None:
        """The running sequences, if they are to get a token with this extend step: when one of them
        streams, or a prompt goes on for longer than this step. None: prefill goes first."""
        if self._pace is None or not self._running:
            return None
        self._running.drop_complete(1)
        long = False
        if prefilling:
            first = prefilling[0]
            long = first.total_tokens - first.most_kv > self._tokens
        rows = self._running.rows
        return rows if self._running and (long or rows.watched) else None

    def riders(self, rows: Rows | None, pace: Pace | None) -> Rows | None:
        """`rows`, if an extend step limited by `pace` has room for all of them beside prompts."""
        if rows is None or self._pace is None or len(rows.slots) > self._pace.riders:
            return None
        tokens = min(self._tokens, pace.work if pace is not None else self._tokens)
        few = 2 * len(rows.slots) * ALIGNMENT <= tokens and len(rows.slots) < self._most_rows
        return rows if few and self._slots.most_kv[rows.slots].max() <= self._pace.reach else None

    def ride(self, rows: Rows, planner: ExtendPlanner) -> bool:
        """Pack the next token of `rows`; False, if pages are short, changes nothing."""
        new_pages: list[tuple[int, int]] = []
        if self._admission.grow(rows, new_pages, 1):
            self._admission.shrink(rows, new_pages)
            return False
        planner.ride(rows)
        self._slots.advance(rows.slots, 1)
        return True
