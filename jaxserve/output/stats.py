"""Counters of the engine thread. Host time is the Python between steps, not the waiting."""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from typing import Any

from jaxserve.packing.batch import Batch, DecodeBatch
from jaxserve.request import Request

WINDOW_SECONDS = 10.0
SAMPLE_SECONDS = 0.1
PHASES: tuple[str, ...] = ("schedule", "prepare", "dispatch", "commit")
OUTCOMES: tuple[str, ...] = ("stop", "length", "abort", "error")
LATENCIES: tuple[str, ...] = (
    "queue_time",
    "time_to_first_token",
    "time_per_output_token",
    "e2e_latency",
)
BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-4, 3) for digit in (1, 2, 5))
"""Upper bounds of the latencies' buckets, seconds: 0.1 ms to 500 s."""


class Throughput:
    """Tokens a second over the last WINDOW_SECONDS of work. Time without requests does not count,
    so that it says how fast the engine is rather than how much it is used."""

    def __init__(self) -> None:
        self._now = time.perf_counter()
        self._tokens = 0
        self._idle = 0.0
        self._samples: deque[tuple[float, int]] = deque([(self._now, 0)])

    def rested(self, seconds: float) -> None:
        """There was nothing to do."""
        self._idle += seconds

    def add(self, tokens: int) -> None:
        """`tokens` more have come."""
        self._now = now = time.perf_counter() - self._idle
        self._tokens += tokens
        samples = self._samples
        if now - samples[-1][0] < SAMPLE_SECONDS:
            return
        samples.append((now, self._tokens))
        while samples[1][0] <= now - WINDOW_SECONDS:
            samples.popleft()

    @property
    def value(self) -> float:
        """Tokens a second; 0 before the first."""
        start, before = self._samples[0]
        return (self._tokens - before) / max(self._now - start, 1e-9)


class Histogram:
    """Counts of values by bucket: counts[i] are those above BOUNDS[i - 1] and at most BOUNDS[i]."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.sum += value

    def as_dict(self) -> dict[str, Any]:
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "sum": self.sum}


class Stats:
    """Cumulative counts since the start, and throughput over the last seconds.

    Steps and tokens are counted as they come, everything else once for each request that ends.
    """

    def __init__(self) -> None:
        self.extend_steps = 0
        self.mixed_steps = 0
        self.decode_steps = 0
        self.generated_tokens = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.finished = dict.fromkeys(OUTCOMES, 0)
        self.latencies = {name: Histogram() for name in LATENCIES}
        self._ended = _Sums()
        self._throughput = Throughput()

    @property
    def steps(self) -> int:
        """Steps queued on the device so far."""
        return self.extend_steps + self.decode_steps

    @property
    def throughput(self) -> float:
        """Output tokens a second, see Throughput."""
        return self._throughput.value

    def spent(self, phase: str, seconds: float) -> None:
        """The host worked on a step."""
        self.seconds[phase] += seconds

    def rested(self, seconds: float) -> None:
        """The engine had no request."""
        self._throughput.rested(seconds)

    def dispatched(self, batch: Batch) -> None:
        """A step, or several decode steps at once, were queued on the device."""
        if isinstance(batch, DecodeBatch):
            self.decode_steps += batch.steps
        else:
            self.extend_steps += 1
            self.mixed_steps += batch.mixed

    def committed(self, tokens: int) -> None:
        """A step's `tokens` were handed out."""
        self.generated_tokens += tokens
        if tokens:  # the step behind the last request of all brings none
            self._throughput.add(tokens)

    def ended(self, request: Request) -> None:
        """A request has left the scheduler. Aborted and failed ones count in no latency."""
        reason = request.finish_reason
        assert reason is not None
        outcome = "error" if reason.get("status_code") else reason["type"]
        self.finished[outcome] += 1
        self._ended.add(request)
        if outcome in ("stop", "length"):
            self._observe(request)

    def _observe(self, request: Request) -> None:
        submitted, admitted = request.submitted_time, request.admitted_time
        first, finished = request.first_token_time, request.finish_time
        assert submitted is not None and admitted is not None
        assert first is not None and finished is not None
        latencies = self.latencies
        latencies["queue_time"].observe(admitted - submitted)
        latencies["time_to_first_token"].observe(first - request.created)
        latencies["e2e_latency"].observe(finished - request.created)
        more = len(request.output_ids) - 1
        if more > 0:
            latencies["time_per_output_token"].observe((finished - first) / more)

    def as_dict(self, live: Iterable[Request] = ()) -> dict[str, Any]:
        """The counters, see docs/api.md. `live`: the requests that have not ended."""
        sums = self._ended.with_(live)
        return {
            "extend_steps": self.extend_steps,
            "mixed_steps": self.mixed_steps,
            "decode_steps": self.decode_steps,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens": sums.prompt_tokens,
            "cached_tokens": sums.cached_tokens,
            "cached_host_tokens": sums.cached_host_tokens,
            "cache_hit_rate": sums.cached_tokens / max(sums.prompt_tokens, 1),
            "retractions": sums.retractions,
            "finished_requests": dict(self.finished),
            "latencies": {name: x.as_dict() for name, x in self.latencies.items()},
            "host_ms_per_step": 1e3 * sum(self.seconds.values()) / max(self.steps, 1),
            "host_seconds": dict(self.seconds),
            "last_gen_throughput": self.throughput,
        }


@dataclasses.dataclass(slots=True)
class _Sums:
    """Of requests that were admitted: prompt tokens, those of them that the cache had (and those
    of these that the host had), and retractions. A request that left the queue without having run
    counts nowhere."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_host_tokens: int = 0
    retractions: int = 0

    def add(self, request: Request) -> None:
        if request.admitted_time is not None:
            self.prompt_tokens += len(request.prompt_ids)
            self.cached_tokens += request.cached_tokens
            self.cached_host_tokens += request.cached_host_tokens or 0
            self.retractions += request.num_retractions

    def with_(self, live: Iterable[Request]) -> _Sums:
        """These and the `live` requests', so that a count does not wait for a request's end."""
        sums = dataclasses.replace(self)
        for request in live:
            sums.add(request)
        return sums
