"""Callers of the load test: threads and tasks that wait, stream, leave, abort and are refused."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jaxserve
from benchmarks.load_cases import SAMPLES, Case
from benchmarks.load_faults import Faults
from jaxserve.errors import InvalidRequestError

SHAPES = ("single",) * 5 + ("batch", "samples")
ENDS = ("wait",) * 5 + ("stream",) * 3 + ("close", "drop", "cancel", "timeout", "invalid", "twice")
SYNC_ENDS = tuple(end for end in ENDS if end not in ("cancel", "timeout"))
"""How a call ends: waited for, streamed to its end, its stream closed or dropped half way, its task
cancelled, given up after a while, refused, or refused because its id is in flight."""


@dataclasses.dataclass
class Plan:
    """One call. rids: by request, in result order."""

    number: int
    cases: list[Case]
    samples: int
    end: str
    arguments: dict[str, Any]
    rids: list[str]
    abortable: bool

    def case_of(self, index: int) -> tuple[Case, int]:
        """The case and the sample of request `index`."""
        return self.cases[index // self.samples], index % self.samples


class Ledger:
    """Hands out plans, and keeps what came of them. Thread-safe.

    violations: what must not have happened. left: ids whose calls have ended. active: calls in
    progress, with their beginnings. on_progress: called with the number of requests whose calls
    have ended.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        requests: int,
        faults: Faults,
        seed: int,
        on_progress: Callable[[int], None],
    ):
        self.outcomes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.tokens = 0
        self.retractions = 0
        self.violations: list[str] = []
        self.active: dict[int, tuple[Plan, float]] = {}
        self.left: set[str] = set()
        self._cases = cases
        self._left = requests
        self._ended = 0
        self._faults = faults
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._abortable: deque[str] = deque(maxlen=64)
        self._aborted: set[str] = set()
        self._lock = threading.Lock()
        self._on_progress = on_progress

    def plan(self, ends: Sequence[str]) -> Plan | None:
        """The next call; None when there are to be no more."""
        with self._lock:
            rng = self._random
            if self._left <= 0:
                return None
            end, shape = rng.choice(ends), rng.choice(SHAPES)
            samples = rng.randint(2, SAMPLES) if shape == "samples" else 1
            cases = [rng.choice(self._cases) for _ in range(1)]
            if shape == "batch":
                alike = [c for c in self._cases if type(c.prompt) is type(cases[0].prompt)]
                cases += rng.choices(alike, k=rng.randint(1, 3))
            number = next(self._numbers)
            names = [f"load-{number}-{row}." for row in range(len(cases))]
            rids = names
            if samples > 1:
                rids = [f"{name}_{sample}" for name in names for sample in range(samples)]
            name = "prompt" if isinstance(cases[0].prompt, str) else "input_ids"
            prompts = [case.prompt for case in cases]
            params = [case.params | {"n": samples} for case in cases]
            single = shape != "batch"
            arguments = {
                name: prompts[0] if single else prompts,
                "sampling_params": params[0] if single else params,
                "rid": names[0] if single else names,
                "priority": rng.randint(0, 3),
                "return_logprob": rng.random() < 0.1,
                "stream": end in ("stream", "close", "drop", "twice"),
            }
            abortable = end in ("wait", "stream") and rng.random() < 0.15
            if abortable:
                self._abortable.append(rng.choice(names))
            if end == "invalid":
                arguments["sampling_params"] = {"top_p": 0}
            self._left -= len(rids)
            return Plan(number, cases, samples, end, arguments, rids, abortable)

    def victim(self) -> str | None:
        """The id of a request, or of a prompt's samples, that may be aborted now."""
        with self._lock:
            if not self._abortable or self._random.random() < 0.5:
                return None
            return self._abortable.popleft()

    def wait(self, most: float) -> float:
        """Seconds for a caller to wait before it leaves."""
        with self._lock:
            return self._random.random() ** 3 * most

    @contextlib.contextmanager
    def watch(self, plan: Plan) -> Iterator[None]:
        """Around a call: its time, and what it raises."""
        began = time.perf_counter()
        self.active[plan.number] = plan, began
        outcome = plan.end
        try:
            yield
        except asyncio.CancelledError:
            outcome = "cancel"
        except Exception as error:
            outcome = self._failed(plan, error)
        with self._lock:
            del self.active[plan.number]
            self.latencies.append(time.perf_counter() - began)
            self.outcomes[outcome] += len(plan.rids)
            self.calls[outcome] += 1
            if outcome in ("wait", "stream") and self._faults.doomed.intersection(plan.rids):
                self.violations.append(f"{plan.rids} should have failed")
            self._faults.doomed.difference_update(plan.rids)
            self.left.update(plan.rids)
            self._ended += len(plan.rids)
            ended = self._ended
        self._on_progress(ended)

    def finished(self, plan: Plan, results: Any) -> None:
        """A call has returned `results`, or the last chunk of each request in result order."""
        results = results if isinstance(results, list) else [results]
        if len(results) != len(plan.rids):
            self.violate(plan, f"{len(results)} results for {len(plan.rids)} requests")
        for index, result in enumerate(results):
            case, sample = plan.case_of(index)
            wrong = case.mismatch(result, sample)
            meta = result["meta_info"]
            if meta["id"] != plan.rids[index]:
                wrong = f"the result of {meta['id']}"
            if (meta["finish_reason"] or {}).get("type") == "abort":
                self.outcomes["of these aborted"] += 1
                if not plan.abortable:
                    wrong = "aborted by nobody"
            if wrong:
                self.violate(plan, f"request {index}, {case.params}: {wrong}")
            self.tokens += len(result["output_ids"])
            self.retractions += meta["num_retractions"]

    def chunk(self, plan: Plan, chunk: dict[str, Any]) -> int:
        """Checks a chunk of a stream; the request's index."""
        index = chunk.get("index", 0)
        case, sample = plan.case_of(index)
        wrong = case.no_prefix(chunk["output_ids"], sample)
        if wrong:
            self.violate(plan, f"chunk of {index}: {wrong}")
        return index

    def violate(self, plan: Plan | None, what: str) -> None:
        who = "" if plan is None else f"call {plan.number} ({plan.end}): "
        with self._lock:
            if len(self.violations) < 100:
                self.violations.append(f"{who}{what}")

    def _failed(self, plan: Plan, error: Exception) -> str:
        """Whether the call was allowed to raise `error`: the outcome's name."""
        if plan.end == "timeout" and isinstance(error, TimeoutError):
            return "timeout"
        if plan.end in ("invalid", "twice") and isinstance(error, InvalidRequestError):
            return "refused"
        fault = self._faults.blame(error)
        fits = fault is not None and {
            "host": bool(fault.rids.intersection(plan.rids)),
            "stops": any({"stop", "stop_regex"} & case.params.keys() for case in plan.cases),
            "encode": "prompt" in plan.arguments and fault.thread == threading.get_ident(),
            "decode": fault.thread == threading.get_ident(),
        }.get(fault.kind, False)
        if not fits:
            self.violate(plan, f"raised {error!r}, because of {error.__cause__!r}")
            return "error"
        assert fault is not None
        with self._lock:
            fault.failed_calls += 1
            if fault.kind != "host" and fault.failed_calls > 1:
                self.violations.append(f"one {fault.kind} failed {fault.failed_calls} calls")
        return f"failed by {fault.kind}"


def call_in_thread(engine: jaxserve.Engine, ledger: Ledger) -> None:
    """A thread: one call after the other."""
    while (plan := ledger.plan(SYNC_ENDS)) is not None:
        victim = ledger.victim()
        if victim is not None:
            engine.abort_request(victim)
        with ledger.watch(plan):
            if plan.arguments["stream"]:
                _read(engine, ledger, plan, engine.generate(**plan.arguments))
            else:
                ledger.finished(plan, engine.generate(**plan.arguments))


def _read(engine: jaxserve.Engine, ledger: Ledger, plan: Plan, stream: Any) -> None:
    if plan.end == "twice":
        try:
            engine.generate(**plan.arguments)
        finally:
            stream.close()
    last: dict[int, dict[str, Any]] = {}
    left = ledger.wait(10)
    for chunk in stream:
        last[ledger.chunk(plan, chunk)] = chunk
        left -= 1
        if plan.end != "stream" and left < 0:
            break
    if plan.end == "close":
        stream.close()
    elif plan.end == "stream":
        ledger.finished(plan, [last[index] for index in sorted(last)])


async def call_in_task(engine: jaxserve.Engine, ledger: Ledger) -> None:
    """A task: one call after the other."""
    while (plan := ledger.plan(ENDS)) is not None:
        victim = ledger.victim()
        if victim is not None:
            engine.abort_request(victim)
        with ledger.watch(plan):
            if plan.arguments["stream"]:
                await _aread(engine, ledger, plan, await engine.async_generate(**plan.arguments))
                continue
            call = engine.async_generate(**plan.arguments)
            if plan.end == "timeout":
                call = asyncio.wait_for(call, ledger.wait(5))
            task = asyncio.ensure_future(call)
            if plan.end == "cancel":
                await asyncio.sleep(ledger.wait(2))
                task.cancel()
            ledger.finished(plan, await task)


async def _aread(engine: jaxserve.Engine, ledger: Ledger, plan: Plan, stream: Any) -> None:
    if plan.end == "twice":
        try:
            await engine.async_generate(**plan.arguments)
        finally:
            await stream.aclose()
    last: dict[int, dict[str, Any]] = {}
    left = ledger.wait(10)
    async for chunk in stream:
        last[ledger.chunk(plan, chunk)] = chunk
        left -= 1
        if plan.end != "stream" and left < 0:
            break
    if plan.end == "close":
        await stream.aclose()
    elif plan.end == "stream":
        ledger.finished(plan, [last[index] for index in sorted(last)])
