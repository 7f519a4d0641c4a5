"""What a step is made of: every kernel launch of a decode (and extend) step, from a device trace.

    python -m benchmarks.profile --model llama-3.1-8b --rows 1 --context 512 --out profile.json

Traces one `generate` of `--rows` requests after a warm-up with other token ids, and prints for each
program: launches, busy and elapsed time a decode step, and the kernels in order of their time, of
the first GPU; and what the host spent on a step when nothing was traced. Needs a CUDA device to
show kernels; on a CPU only the host's phases are in the trace.

While JAX traces, each kernel is launched by itself. To see what launching graphs costs the host
(`--host 40`: the 40 events of all threads that took longest), keep them:

    XLA_FLAGS=--xla_enable_command_buffers_during_profiling=true python -m benchmarks.profile ...
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import machine, trace, workloads
from benchmarks.engine import dummy_engine, generate

HOST_PHASES = ("schedule", "prepare", "dispatch", "wait", "commit")


@dataclasses.dataclass
class Program:
    """Kernels of all runs of one compiled program, in nanoseconds."""

    launches: int = 0
    busy: float = 0.0
    kernels: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    first: float = float("inf")
    last: float = 0.0


def by_program(found: list[trace.Kernel]) -> dict[str, Program]:
    programs: dict[str, Program] = collections.defaultdict(Program)
    for kernel in found:
        program = programs[kernel.program or "(copies)"]
        program.launches += 1
        program.busy += kernel.end - kernel.start
        program.kernels[kernel.name].append(kernel.end - kernel.start)
        program.first = min(program.first, kernel.start)
        program.last = max(program.last, kernel.end)
    return programs


def summary(program: Program, runs: int) -> dict[str, Any]:
    """Per run: launches, busy and elapsed microseconds, kernels with (count, us a run, us each)."""
    kernels = [
        {
            "kernel": name,
            "launches": len(times) / runs,
            "us": sum(times) / runs / 1e3,
            "median_us": sorted(times)[len(times) // 2] / 1e3,
        }
        for name, times in program.kernels.items()
    ]
    return {
        "runs": runs,
        "launches": program.launches / runs,
        "busy_us": program.busy / runs / 1e3,
        "elapsed_us": (program.last - program.first) / runs / 1e3,
        "kernels": sorted(kernels, key=lambda k: -k["us"]),
    }


def runs_of(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], dispatches: int
) -> tuple[int, str]:
    """(by how much the figures of program `name` are divided, what they are then of): decode steps,
    of which one program may have several, and all runs of any other program together. before,
    after: `get_server_info()`, between which there were `dispatches` of steps of any kind."""
    if "decode" not in name:
        return 1, "in all"
    extend, decode = (after[key] - before[key] for key in ("extend_steps", "decode_steps"))
    at_once = after["num_continuous_decode_steps"]
    several = at_once * (decode - (dispatches - extend)) // max(at_once - 1, 1)
    return (several if "decode_many" in name else decode - several), "a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95")
    parser.add_argument("--top", type=int, default=24, help="kernels shown of each program")
    parser.add_argument("--host", type=int, default=0, help="events of the host's threads shown")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    options = parser.parse_args()
    sampling = workloads.sampling("uniform_s" if options.sampled else "uniform")

    def requests(seed: int) -> list[tuple[list[int], int]]:
        draw = random.Random(seed)
        vocab = workloads.SHAPES[options.model]["vocab_size"]
        return [
            (workloads.random_ids(draw, vocab, options.context), options.steps)
            for _ in range(options.rows)
        ]

    with tempfile.TemporaryDirectory() as folder:
        with dummy_engine(options.model, options.engine) as (engine, _):
            generate(engine, requests(1), sampling)
            before = engine.get_server_info()
            untraced = generate(engine, requests(2), sampling)
            after = engine.get_server_info()
            profile = jax.profiler.ProfileOptions()
            profile.python_tracer_level = 0
            with jax.profiler.trace(folder, profiler_options=profile):
                traced = generate(engine, requests(3), sampling)
            end = engine.get_server_info()
        programs = by_program(trace.kernels(folder, "/device:GPU:0"))
        events = trace.host_events(folder)
        phases = trace.phases(events, HOST_PHASES)
    result: dict[str, Any] = {
        **machine.describe(),
        "benchmark": "profile",
        "model": options.model,
        "rows": options.rows,
        "context": options.context,
        "steps": options.steps,
        "sampled": options.sampled,
        "seconds_untraced": untraced,
        "seconds_traced": traced,
        "host_us_per_step": {
            name: round(1e6 * (after["host_seconds"][name] - spent) / options.steps, 1)
            for name, spent in before["host_seconds"].items()
        },
        "programs": {},
        "host_us": {
            name: {"count": len(t), "median": sorted(t)[len(t) // 2] / 1e3, "sum": sum(t) / 1e3}
            for name, t in phases.items()
        },
    }
    print(f"{options.model} B={options.rows}: {untraced * 1e3:.1f} ms, traced {traced * 1e3:.1f}")
    for name, program in sorted(programs.items(), key=lambda p: -p[1].busy):
        runs, each = runs_of(name, after, end, len(phases["dispatch"]))
        facts = summary(program, runs)
        result["programs"][name] = facts
        print(
            f"\n{name}, {each}: {facts['launches']:.1f} launches, "
            f"busy {facts['busy_us']:.1f} us, elapsed {facts['elapsed_us']:.1f}"
        )
        for kernel in facts["kernels"][: options.top]:
            print(
                f"  {kernel['us']:9.1f} us {kernel['launches']:7.1f} x {kernel['median_us']:8.2f}  "
                f"{kernel['kernel'][:90]}"
            )
    print("host, untraced:", result["host_us_per_step"])
    for name, facts in result["host_us"].items():
        print(f"host, traced, {name:10s} {facts['count']:5d} x median {facts['median']:9.1f} us")
    for thread, name, times in events[: options.host]:
        each = f"{len(times):6d} x {sorted(times)[len(times) // 2] / 1e3:9.1f} us"
        print(f"host {sum(times) / 1e6:9.2f} ms {each}  {thread[:24]:24s} {name[:90]}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
