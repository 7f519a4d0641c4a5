"""Output tokens per second of one `Engine.generate` over many requests.

    python -m benchmarks.offline_throughput --model llama-3.1-8b \\
        --cases uniform uniform_s ragged ragged_s --out-dir results

A warm-up over a quarter of the requests (other token ids, at most 64 new tokens) comes first; the
timed calls must compile nothing. Each repeat has token ids of its own, so that no prefix cache
helps but within a call. All cases run on one engine. Cases: benchmarks/workloads.py; those ending
in _s are sampled.

The floor is the prefill's FLOPs at the measured matrix rate plus the decode steps' bytes at the
measured copy bandwidth; "gb_per_s" is those bytes over the whole time.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import machine, workloads
from benchmarks.engine import Counts, differences, generate
from benchmarks.runs import Benchmark, Case, Measured, command

WARM_UP_MOST = 64
"""New tokens of a request of the warm-up."""


def measure(engine: Any, case: Case) -> Measured:
    """Warm-up and timed calls of one case on `engine`."""
    warm = case.requests(seed=1, share=0.25)
    generate(engine, [(ids, min(out, WARM_UP_MOST)) for ids, out in warm], case.sampling)
    before, counts, times = engine.get_server_info(), Counts(), []
    for seed in range(2, 2 + case.repeats):
        timed = case.requests(seed)
        times.append(generate(engine, timed, case.sampling, counts))
    info = engine.get_server_info()
    seconds = statistics.median(times)
    outputs = sum(out for _, out in timed)
    facts = {
        "requests": len(timed),
        "input_tokens": sum(len(ids) for ids, _ in timed),
        "output_tokens": outputs,
        "seconds": [round(t, 4) for t in times],
        "output_tokens_per_s": round(outputs / seconds, 1),
        **differences(before, info, counts),
    }
    floor = machine.Floor.of(workloads.SHAPES[case.model], case.options)
    return Measured(facts, seconds, floor.work(timed, info["max_running_requests"]))


BENCHMARK = Benchmark("offline_throughput", workloads.THROUGHPUT, repeats=3, measure=measure)

if __name__ == "__main__":
    command(__doc__, [BENCHMARK])
