"""The engine's own Python per decode step: scheduling, packing and committing, without a device.

    python -m benchmarks.host_overhead --out result.json

A pretended device answers every step at once with random tokens. Reported for each number of
running rows and of queued requests: microseconds a step (median over dispatches, and mean, which
has the occasional page and the tokens' move into lists) and a token. Dispatching the program is not
in it: `get_server_info()["host_seconds"]` has that of a real engine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import machine
from jaxserve.cache.pages import PageAllocator
from jaxserve.mailbox import Mailbox
from jaxserve.output.commit import commit
from jaxserve.packing import pack
from jaxserve.packing.batch import Batch, DecodeBatch
from jaxserve.packing.buckets import Buckets
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.scheduling import Scheduling

PAGE_SIZE, PROMPT = 64, 512
PHASES = ("schedule", "prepare", "commit")


def request(number: int, new: int, mailbox: Mailbox, draw: random.Random) -> Request:
    return Request(
        rid=str(number),
        index=number,
        prompt_ids=[draw.randrange(1000)] * PROMPT,
        params=SamplingParams(),
        max_new_tokens=new,
        stop_ids=frozenset({7, 11}),
        masked_ids=(),
        seed=number,
        sample_index=0,
        mailbox=mailbox,
    )


def result_of(batch: Batch, tokens: np.ndarray) -> SimpleNamespace:
    """As a device returns it: tokens [n, B] of n steps."""
    return SimpleNamespace(
        batch=batch, drawn=lambda: (tokens, {}), prompt_payloads={}, accepted=None
    )


def measure(rows: int, queued: int, steps: int, at_once: int = 1) -> dict[str, Any]:
    """Microseconds of each of `steps` decode steps, `at_once` in a dispatch, with `rows` running
    and `queued` waiting requests."""
    scheduling = Scheduling(
        buckets=Buckets.make(rows, 8192),
        page_size=PAGE_SIZE,
        max_rows=rows,
        max_prefill_tokens=8192,
        steps_per_dispatch=at_once,
    )
    scheduler = Scheduler(scheduling, PageAllocator(rows * 64))
    draw, mailbox = random.Random(0), Mailbox()
    for number in range(rows + queued):
        scheduler.add(request(number, steps + 8, mailbox, draw))
    dispatches = steps // at_once
    tokens = np.random.default_rng(0).integers(20, 1000, (dispatches, at_once, rows))
    tokens = tokens.astype(np.int32)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for drawn in tokens:
        batch = None
        while not isinstance(batch, DecodeBatch):  # the prompts, first
            if batch is not None:
                first = np.full((1, batch.row_bucket), 20, np.int32)
                commit(result_of(batch, first), scheduler, [])
            started = time.perf_counter()
            batch = scheduler.schedule()
            scheduled = time.perf_counter()
        assert batch.steps == at_once
        pack.pack_decode(batch, rows)
        prepared = time.perf_counter()
        commit(result_of(batch, drawn), scheduler, [])
        times["schedule"].append(scheduled - started)
        times["prepare"].append(prepared - scheduled)
        times["commit"].append(time.perf_counter() - prepared)
    total = [sum(parts) for parts in zip(*times.values(), strict=True)]
    mean = 1e6 * sum(total) / (dispatches * at_once)

    def median(seconds: Sequence[float]) -> float:
        """Microseconds a step."""
        return round(1e6 * sorted(seconds)[dispatches // 2] / at_once, 1)

    return {
        "rows": rows,
        "queued": queued,
        "steps_at_once": at_once,
        "median_us_per_step": median(total),
        "mean_us_per_step": round(mean, 1),
        "mean_us_per_token": round(mean / rows, 3),
        **{f"{name}_us": median(seconds) for name, seconds in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--queued", type=int, nargs="+", default=[0, 100, 1000, 10000])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--at-once", type=int, default=1, help="decode steps in a dispatch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = []
    for rows in options.rows:
        for queued in options.queued:
            cases.append(measure(rows, queued, options.steps, options.at_once))
            print(json.dumps(cases[-1]), flush=True)
    result = {**machine.describe(), "benchmark": "host_overhead", "cases": cases}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
