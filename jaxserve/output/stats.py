"""Counters of the engine thread. Host time is the Python between steps, not the waiting."""

from __future__ import annotations

import time
from collections import deque

from jaxserve.batch.batch import Batch, DecodeBatch

WINDOW_SECONDS = 10.0


class Stats:
    """Cumulative counts since the start, and throughput over the last seconds."""

    def __init__(self) -> None:
        self.extend_steps = 0
        self.decode_steps = 0
        self.generated_tokens = 0
        self.host_seconds = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    def dispatched(self, batch: Batch, seconds: float) -> None:
        """A step was prepared and queued in `seconds` of host time."""
        if isinstance(batch, DecodeBatch):
            self.decode_steps += 1
        else:
            self.extend_steps += 1
        self.host_seconds += seconds

    def committed(self, tokens: int, seconds: float) -> None:
        """A step's `tokens` were handed out in `seconds` of host time."""
        self.generated_tokens += tokens
        self.host_seconds += seconds
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

    def as_dict(self) -> dict[str, float]:
        steps = self.extend_steps + self.decode_steps
        return {
            "extend_steps": self.extend_steps,
            "decode_steps": self.decode_steps,
            "generated_tokens": self.generated_tokens,
            "host_ms_per_step": 1e3 * self.host_seconds / steps if steps else 0.0,
            "last_gen_throughput": self.throughput,
        }
