"""Counters of the engine thread. Host time is the Python between steps, not the waiting."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from jaxserve.batch.batch import Batch, DecodeBatch

WINDOW_SECONDS = 10.0
PHASES: tuple[str, ...] = ("schedule", "prepare", "dispatch", "commit")


class Stats:
    """Cumulative counts since the start, and throughput over the last seconds."""

    def __init__(self) -> None:
        self.extend_steps = 0
        self.decode_steps = 0
        self.generated_tokens = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._recent: deque[tuple[float, int]] = deque()

    def spent(self, phase: str, seconds: float) -> None:
        """The host worked on a step."""
        self.seconds[phase] += seconds

    def dispatched(self, batch: Batch) -> None:
        """A step, or several decode steps at once, were queued on the device."""
        if isinstance(batch, DecodeBatch):
            self.decode_steps += batch.steps
        else:
            self.extend_steps += 1

    def committed(self, tokens: int) -> None:
        """A step's `tokens` were handed out."""
        self.generated_tokens += tokens
        now = time.perf_counter()
        self._recent.append((now, tokens))
        while self._recent[0][0] < now - WINDOW_SECONDS:
            self._recent.popleft()

    @property
    def throughput(self) -> float:
        """Output tokens a second over the last busy window."""
        if len(self._recent) < 2:
            return 0.0
        (first, _), (last, _) = self._recent[0], self._recent[-1]
        tokens = sum(count for _, count in self._recent) - self._recent[0][1]
        return tokens / max(last - first, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        steps = max(self.extend_steps + self.decode_steps, 1)
        return {
            "extend_steps": self.extend_steps,
            "decode_steps": self.decode_steps,
            "generated_tokens": self.generated_tokens,
            "host_ms_per_step": 1e3 * sum(self.seconds.values()) / steps,
            "host_seconds": dict(self.seconds),
            "last_gen_throughput": self.throughput,
        }
