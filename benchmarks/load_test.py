"""Thousands of requests through one engine from threads and tasks, with failures put into it.

    python -m benchmarks.load_test [--requests 20000] [--threads 64] [--tasks 400] [--seed 0]
                                   [--every 40] [--bound 120] [--out result.json]

A tiny model with random weights on the CPU, on a pool of pages that is too small for what runs.
Prompts, lengths, stops, priorities, batches and samples are random; calls are waited for, streamed,
left half way, cancelled, aborted by id and refused. benchmarks/load_faults.py says which failures
are injected and what each may cost. Every result is compared with that of the undisturbed engine;
every call must end within --bound seconds (the stacks of all threads are dumped if one does not);
at the end all pages and slots must be free, and no request, thread or memory left behind. Runs in a
checkout with the test extra. The exit status is 1 if any of that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import faulthandler
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

import jaxserve
from benchmarks import machine
from benchmarks.load_calls import Ledger, call_in_task, call_in_thread
from benchmarks.load_cases import make_cases
from benchmarks.load_faults import STEP_KINDS, Faults
from jaxserve.request import Request
from tests import inside
from tests.checkpoints import VOCAB, make_checkpoint

MIB = 1 << 20
OPTIONS = {
    "context_length": 256,
    "max_running_requests": 32,
    "chunked_prefill_size": 128,
    "max_total_tokens": 2560,
    "precompile": True,
    "log_level": "critical",
    "random_seed": 0,
    "enable_priority_scheduling": True,
}
GRACE = 30.0
"""Seconds that callers have to end after the engine was shut down because one was late."""


@dataclasses.dataclass(frozen=True)
class Load:
    """The size of a run. every: steps between failed ones. bound: seconds that a call may take.
    growth: bytes that the process may grow by between 25% and 100% of the requests."""

    requests: int = 20_000
    threads: int = 64
    tasks: int = 400
    seed: int = 0
    cases: int = 200
    every: int = 40
    text_rate: float = 1e-3
    bound: float = 120.0
    growth: int = 24 * MIB


class Memory:
    """The process's resident memory when 25%, 50% and 100% of the requests have ended, in bytes."""

    def __init__(self, requests: int):
        self.rss: dict[str, int] = {}
        self._marks = [(0.25 * requests, "25%"), (0.5 * requests, "50%")]

    def progress(self, ended: int) -> None:
        if self._marks and ended >= self._marks[0][0]:
            self.take(self._marks.pop(0)[1])

    def take(self, mark: str) -> None:
        gc.collect()
        self.rss[mark] = psutil.Process().memory_info().rss


def run(model: str, load: Load, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The run's figures. `violations` lists what must not have happened; it should be empty."""
    options = {**OPTIONS, **(options or {})}
    threads = set(threading.enumerate())
    engine = jaxserve.Engine(model_path=model, **options)
    cases = make_cases(engine, load.cases, VOCAB, load.seed)
    engine.flush_cache()
    others = _requests_in_memory()
    faults = Faults(engine, load.every, load.text_rate, load.seed)
    memory = Memory(load.requests)
    ledger = Ledger(cases, load.requests, faults, load.seed, memory.progress)
    began = time.perf_counter()
    _call(engine, ledger, load)
    seconds = time.perf_counter() - began
    memory.take("100%")
    info = _check_engine(engine, ledger, faults, others)
    engine.shutdown()
    left = [thread.name for thread in set(threading.enumerate()) - threads]
    if left:
        ledger.violate(None, f"threads are left: {left}")
    grown = memory.rss["100%"] - memory.rss["25%"]
    if grown > load.growth:
        ledger.violate(None, f"the process grew by {grown / MIB:.0f} MiB after 25%")
    latencies = sorted(ledger.latencies)
    return {
        "benchmark": "load_test",
        **machine.describe(),
        "load": dataclasses.asdict(load),
        "options": options,
        "requests": sum(ledger.outcomes.values()) - ledger.outcomes["of these aborted"],
        "requests_by_outcome": dict(sorted(ledger.outcomes.items())),
        "calls_by_outcome": dict(sorted(ledger.calls.items())),
        "seconds": round(seconds, 1),
        "tokens": info.get("generated_tokens"),
        "steps": info.get("extend_steps", 0) + info.get("decode_steps", 0),
        "call_seconds": {
            name: round(latencies[int(share * (len(latencies) - 1))], 3)
            for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))
        },
        "rss_mib": {mark: round(size / MIB, 1) for mark, size in memory.rss.items()},
        "retractions": info.get("retractions"),
        "finished_requests": info.get("finished_requests"),
        "faults": faults.costs(),
        "violations": ledger.violations,
    }


def _call(engine: jaxserve.Engine, ledger: Ledger, load: Load) -> None:
    """Let all callers loose, and wait for them."""

    async def tasks() -> None:
        await asyncio.gather(*(call_in_task(engine, ledger) for _ in range(load.tasks)))

    callers = [
        threading.Thread(target=call_in_thread, args=(engine, ledger), daemon=True)
        for _ in range(load.threads)
    ]
    callers.append(threading.Thread(target=lambda: asyncio.run(tasks()), daemon=True))
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        callers[-1].join(0.25)
        if not callers[-1].is_alive():
            next((c for c in callers if c.is_alive()), callers[-1]).join(0.25)
        now = time.perf_counter()
        late = [plan for plan, start in list(ledger.active.values()) if now - start > load.bound]
        if late:
            faulthandler.dump_traceback(all_threads=True)
            for plan in late:
                ledger.violate(plan, f"has not ended after {load.bound} s")
            threading.Thread(target=engine.shutdown, daemon=True).start()
            deadline = time.perf_counter() + GRACE
            for caller in callers:
                caller.join(max(deadline - time.perf_counter(), 0))
            return


def _requests_in_memory() -> int:
    gc.collect()
    return sum(type(x) is Request for x in gc.get_objects())


def _check_engine(
    engine: jaxserve.Engine, ledger: Ledger, faults: Faults, others: int
) -> dict[str, Any]:
    """The engine's counters, when everybody has left. others: requests in memory that are not the
    run's."""
    try:
        flushed, info = engine.flush_cache().success, engine.get_server_info()
    except RuntimeError as error:
        ledger.violate(None, f"the engine has not survived: {error!r}")
        return {}
    scheduler = inside.scheduler(engine)
    facts = {
        "flush_cache()": (flushed, True),
        "available tokens": (info["available_tokens"], info["max_total_num_tokens"]),
        "running and waiting requests": (info["num_running"] + info["num_waiting"], 0),
        "free slots": (scheduler.slots.available, info["max_running_requests"]),
        "reserved request ids": (len(engine._live_ids._holders), 0),
        "unheard failures": (len(faults.doomed - ledger.left), 0),
        "requests left in memory": (max(_requests_in_memory() - others, 0), 0),
        "late compilations": (info["late_compiles"], 0),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            ledger.violate(None, f"{name}: {found} instead of {expected}")
    for kind in STEP_KINDS:
        if not any(fault.kind == kind for fault in faults.injected.values()):
            ledger.violate(None, f"no failure of kind {kind} was injected")
    return info


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in dataclasses.fields(Load):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    with tempfile.TemporaryDirectory() as folder:
        result = run(make_checkpoint(folder), Load(**arguments))
    text = json.dumps(result, indent=1)
    print(text, flush=True)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if result["violations"] else 0)


if __name__ == "__main__":
    main()
