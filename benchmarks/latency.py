"""Time to first token and time per token of a few requests, with the bandwidth they imply.

    python -m benchmarks.latency --model llama-3.1-8b --cases lat1 lat1_s lat8 --out-dir results

Time to first token: median wall time of calls with one new token. Time per token: (median with 256
new tokens - that) / 255. Every call has token ids of its own. A decode step reads every weight
once, and each row's keys and values; those bytes over the time per token are the bandwidth
reached, and over the measured copy bandwidth the floor. All cases run on one engine.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import machine, workloads
from benchmarks.engine import Counts, differences, generate
from benchmarks.runs import Benchmark, Case, Measured, command


def measure(engine: Any, case: Case) -> Measured:
    """Warm-up and timed calls of one case on `engine`."""
    items = case.requests(seed=1)
    rows, prompt, output = len(items), len(items[0][0]), items[0][1]
    generate(engine, items, case.sampling)
    before, counts = engine.get_server_info(), Counts()
    first, whole = [], []
    for repeat in range(case.repeats):
        short, full = (case.requests(seed=2 + 2 * repeat + kind) for kind in range(2))
        first.append(generate(engine, [(ids, 1) for ids, _ in short], case.sampling, counts))
        whole.append(generate(engine, full, case.sampling, counts))
    info = engine.get_server_info()
    ttft = statistics.median(first)
    per_token = (statistics.median(whole) - ttft) / (output - 1)
    facts = {
        "requests": rows,
        "ttft_ms": round(ttft * 1e3, 3),
        "ttft_ms_runs": [round(t * 1e3, 3) for t in first],
        "seconds": [round(t, 4) for t in whole],
        "ms_per_token": round(per_token * 1e3, 4),
        "ms_per_token_runs": [round(1e3 * (t - ttft) / (output - 1), 4) for t in whole],
        "tokens_per_s": round(rows / per_token, 1),
        "end_to_end_tokens_per_s": round(rows * output / statistics.median(whole), 1),
        **differences(before, info, counts),
    }
    floor = machine.Floor.of(workloads.SHAPES[case.model], case.options)
    moved = floor.decode_bytes(rows * (prompt + output // 2))
    return Measured(facts, per_token, machine.Work(0, moved))


BENCHMARK = Benchmark("latency", workloads.LATENCY, repeats=5, measure=measure)

if __name__ == "__main__":
    command(__doc__, [BENCHMARK])
