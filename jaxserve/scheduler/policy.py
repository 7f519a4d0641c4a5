"""Who runs first: the order of the waiting queue, and whom others may push aside. No jax."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jaxserve.packing.sequence import Sequence
from jaxserve.request import Request

if TYPE_CHECKING:
    from jaxserve.options import Options

LPM_WINDOW = 128
"""How many of the queue "lpm" compares: a match costs microseconds, and the queue may be long."""


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """The scheduling options."""

    schedule: str = "fcfs"
    """"fcfs" (first come, first served) or "lpm" (longest cached prefix first)."""
    conservativeness: float = 1.0
    """Pages that admission leaves free for each running request to grow into."""
    priorities: bool = False
    """Whether requests have any; the greatest goes first."""
    low_first: bool = False
    """The least goes first."""
    threshold: int = 10
    """A waiting request preempts running ones whose priority is worse by more."""
    default_priority: int | None = None
    """Of requests that bring none; None puts those last."""

    @classmethod
    def of(cls, options: Options) -> Policy:
        """As the options say."""
        return cls(
            schedule=options.schedule_policy,
            conservativeness=options.schedule_conservativeness,
            priorities=options.enable_priority_scheduling,
            low_first=options.schedule_low_priority_values_first,
            threshold=options.priority_scheduling_preemption_threshold,
            default_priority=options.default_priority_value,
        )

    def rank(self, request: Request) -> float:
        """Less goes first."""
        if not self.priorities:
            return 0
        priority = self.default_priority if request.priority is None else request.priority
        if priority is None:
            return math.inf
        return priority if self.low_first else -priority


class WaitingQueue:
    """Sequences in the order of their rank and arrival: those that were retracted are before those
    that came later."""

    def __init__(self) -> None:
        self.version = 0
        """Another number after every change of the queue."""
        self._entries: list[tuple[float, int, Sequence]] = []  # negated: the first one is last
        self._groups: dict[str, dict[Sequence, None]] = {}
        self._preferred: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in reversed(self._entries))

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._entries, self._entry(sequence))
        if sequence.request.group:
            self._groups.setdefault(sequence.request.group, {})[sequence] = None
        self._preferred.clear()
        self.version += 1

    def remove(self, sequence: Sequence) -> None:
        """ValueError if it does not wait."""
        at = bisect.bisect_left(self._entries, self._entry(sequence))
        if at == len(self._entries) or self._entries[at][2] is not sequence:
            raise ValueError(f"request {sequence.request.rid!r} does not wait")
        del self._entries[at]
        group = sequence.request.group
        if group:
            del self._groups[group][sequence]
            if not self._groups[group]:
                del self._groups[group]
        if sequence in self._preferred:
            self._preferred.remove(sequence)
        self.version += 1

    def first(self) -> Sequence:
        """Who runs next; there must be one."""
        return self._preferred[-1] if self._preferred else self._entries[-1][2]

    def prefer(self, cached: Callable[[Sequence], int]) -> None:
        """Let the first LPM_WINDOW go in the order of `cached`, most first, until one is added."""
        window = [sequence for _, _, sequence in self._entries[-LPM_WINDOW:]]
        self._preferred = sorted(window, key=cached)  # stable: ties stay in their order

    def siblings(self, group: str) -> list[Sequence]:
        """The waiting samples of one prompt."""
        return list(self._groups.get(group, ()))

    def last(self) -> Sequence:
        """Who is behind all others; there must be one."""
        return self._entries[0][2]

    @staticmethod
    def _entry(sequence: Sequence) -> tuple[float, int, Sequence]:
        return (-sequence.rank, -sequence.arrival, sequence)
