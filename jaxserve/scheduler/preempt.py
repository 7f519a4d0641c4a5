"""Who has to make room for a request of higher priority. No jax."""

from __future__ import annotations

from collections.abc import Iterator

from jaxserve.packing.sequence import Sequence
from jaxserve.scheduler.admission import Admission
from jaxserve.scheduler.policy import WaitingQueue
from jaxserve.scheduler.running import Running


class Preemption:
    """Names running sequences whose priority is worse by more than `threshold` than that of the
    first in the queue, as long as that one has no room."""

    def __init__(self, threshold: float, running: Running, admission: Admission) -> None:
        self._threshold = threshold
        self._running = running
        self._admission = admission
        self._nobody: object = None
        """The circumstances under which there was none to name."""

    def victims(self, waiting: WaitingQueue, circumstances: object) -> Iterator[Sequence]:
        """Sequences to retract, the last in the order first; whoever iterates retracts each before
        the next. circumstances: if equal to what they were when there was none, there is none."""
        now = (circumstances, len(self._running))
        if self._nobody == now:
            return
        first = waiting.first()
        worse = [s for s in self._running if s.rank - first.rank > self._threshold]
        worse.sort(key=lambda s: s.order)
        if not worse:
            self._nobody = now
        while worse and not self._admission.has_room(first):
            yield worse.pop()

    def reset(self) -> None:
        self._nobody = None
