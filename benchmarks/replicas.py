"""Output tokens per second of 1, 2, 4 replicas in one process, with as many times the requests.

    python -m benchmarks.replicas --model qwen2.5-0.5b --replicas 1 2 4 --out-dir results
    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m benchmarks.replicas --model tiny --scale 0.1 --engine '{"precompile": true}'

An engine for each number of replicas, one after the other; the first one's programs are the others'
too. What each is timed with, the median of `repeats` calls with token ids of their own:

    more        `case` once for each replica: weak scaling
    split       `case` once, whatever the number of replicas: strong scaling
    pinned      `case` once, on the first replica while the others rest: what their threads cost

"scaling" is the tokens a second over those of the first engine's `more`, "of_ideal" that over the
ratio of replicas. "host_ms_per_step" is what the engine threads worked, for each step of any
replica, and "dispatch" of it what queueing the step's program took: where replicas share one
interpreter, these grow before throughput falls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, workloads
from benchmarks.engine import Counts, Requests, differences, dummy_engine, generate
from benchmarks.offline_throughput import WARM_UP_MOST
from benchmarks.runs import Case

WAYS = ("more", "split", "pinned")


def timed(engine: Any, case: Case, way: str, replicas: int) -> dict[str, Any]:
    """One way of `WAYS` on an engine of so many replicas."""
    copies = replicas if way == "more" else 1
    options = {"routed_dp_rank": 0} if way == "pinned" else {}
    before, counts, times = engine.get_server_info(), Counts(), []
    for seed in range(2, 2 + case.repeats):
        items = requests(case, seed, copies)
        times.append(generate(engine, items, case.sampling, counts, **options))
    seconds = statistics.median(times)
    after = engine.get_server_info()
    return {
        "requests": len(items),
        "output_tokens_per_s": round(sum(out for _, out in items) / seconds, 1),
        "seconds": [round(t, 4) for t in times],
        "steps_of_each": [b - a for a, b in zip(steps(before), steps(after), strict=True)],
        **differences(before, after, counts),
    }


def requests(case: Case, seed: int, copies: int) -> Requests:
    """`copies` times the case, all with token ids of their own."""
    return [item for copy in range(copies) for item in case.requests(1000 * copy + seed)]


def steps(info: Mapping[str, Any]) -> list[int]:
    """Of each replica so far."""
    parts = info.get("replicas", [info])
    return [part["extend_steps"] + part["decode_steps"] for part in parts]


def measure(case: Case, replicas: int, ways: Sequence[str]) -> dict[str, Any]:
    """All ways on one engine, after a warm-up on each replica."""
    options = {**case.options, "dp_size": replicas}
    with dummy_engine(case.model, options, [case.name]) as (engine, startup):
        for rank in range(replicas):
            warm = case.requests(seed=1, share=0.25)
            short = [(ids, min(out, WARM_UP_MOST)) for ids, out in warm]
            generate(engine, short, case.sampling, routed_dp_rank=rank)
        return {
            "replicas": replicas,
            "startup_s": round(startup, 2),
            **{way: timed(engine, case, way, replicas) for way in ways},
        }


def compared(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each engine and way, against the first engine."""
    first = found[0]
    rows = []
    for result in found:
        for way in (way for way in WAYS if way in result):
            speed = result[way]["output_tokens_per_s"]
            scaling = speed / first["more"]["output_tokens_per_s"]
            ratio = result["replicas"] / first["replicas"] if way != "pinned" else 1
            rows.append(
                {
                    "replicas": result["replicas"],
                    "way": way,
                    "output_tokens_per_s": speed,
                    "scaling": round(scaling, 3),
                    "of_ideal": round(scaling / ratio, 3),
                    "host_ms_per_step": result[way]["host_ms_per_step"],
                    "dispatch_ms_per_step": result[way]["host_ms_by_phase"]["dispatch"],
                    "late_compiles": result[way]["late_compiles"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--case", default="uniform", choices=workloads.THROUGHPUT)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    parser.add_argument("--out-dir", type=Path)
    given = parser.parse_args()
    if "more" not in given.ways:
        parser.error("--ways needs 'more', which the others are compared with")
    started = time.perf_counter()
    case = Case(given.model, given.case, given.repeats, given.scale, given.engine)
    found = []
    for replicas in given.replicas:
        found.append(measure(case, replicas, given.ways))
        print(json.dumps(compared(found)[-len(given.ways) :], indent=1), flush=True)
    result = {
        **machine.describe(),
        "benchmark": "replicas",
        "model": given.model,
        "case": given.case,
        "scale": given.scale,
        "engine": given.engine,
        "rows": compared(found),
        "engines": found,
    }
    if given.out_dir:
        name = f"{machine.short_name(result)}_{given.model}_{given.case}_replicas.json"
        given.out_dir.mkdir(parents=True, exist_ok=True)
        (given.out_dir / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
