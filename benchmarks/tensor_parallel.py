"""One model on 1, 2, 4 GPUs that share each layer: times of steps, and of a whole batch.

    python -m benchmarks.tensor_parallel --model llama-3.1-8b --tp 1 2 --out-dir results
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python -m benchmarks.tensor_parallel --model tiny --prompt 64 --tokens 16 --scale 0.05

An engine for each number of devices, in a process of its own that is ended after `--seconds`. Its
programs are for the cases' sizes alone, so that two starts fit into minutes. Of each:

    decode      by rows: ms a token of so many requests (128 in, `--tokens` out; median of five
                calls less the median of five with one token out); what the host works on a step,
                and of it what queueing the program takes; what the first device is busy with a
                step, from a trace in which every kernel is launched by itself (GPUs only)
    prefill     ms to the first token of one prompt of `--prompt` tokens
    uniform     output tokens a second of the case in benchmarks/workloads.py

"speedup" is against the first number of devices.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import children, workloads

# Only the children touch JAX: a parent that did would hold the devices' memory.

ROWS = (1, 8, 64)
CALLS = 5
GREEDY = {"temperature": 0}
LADDER = {"cuda_graph_bs": [1, 8, 64, 256], "max_running_requests": 256}


def prompts(vocab_size: int, rows: int, size: int, seed: int) -> list[list[int]]:
    draw = random.Random(f"{rows}/{size}/{seed}")
    return [workloads.random_ids(draw, vocab_size, size) for _ in range(rows)]


def decode(engine: Any, vocab_size: int, rows: int, tokens: int) -> dict[str, Any]:
    """Of a batch of so many rows."""
    from benchmarks.engine import Counts, differences, generate

    def call(seed: int, out: int) -> float:
        ids = prompts(vocab_size, rows, 128, seed)
        return generate(engine, [(each, out) for each in ids], GREEDY)

    call(-1, tokens)
    first = statistics.median(call(2 * seed, 1) for seed in range(CALLS))
    before = engine.get_server_info()
    whole = [call(2 * seed + 1, tokens) for seed in range(CALLS)]
    found = differences(before, engine.get_server_info(), Counts())
    return {
        "ms": round(1e3 * (statistics.median(whole) - first) / (tokens - 1), 4),
        "ms_runs": [round(1e3 * (each - first) / (tokens - 1), 4) for each in whole],
        "host_ms": found["host_ms_per_step"],
        "dispatch_ms": found["host_ms_by_phase"]["dispatch"],
        "late_compiles": found["late_compiles"],
        "busy_ms": busy(lambda: call(99, 33), 32),
    }


def busy(run: Callable[[], Any], steps: int) -> float | None:
    """Milliseconds a step of the program that most kernels belong to, on the first GPU."""
    import jax

    from benchmarks import trace
    from benchmarks.profile import by_program

    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        found = trace.kernels(folder, "/device:GPU:0")
    if not found:
        return None
    most = max(by_program(found).values(), key=lambda program: program.launches)
    return round(most.busy / steps / 1e6, 4)


def prefill(engine: Any, vocab_size: int, size: int) -> dict[str, Any]:
    """Of one prompt."""
    from benchmarks.engine import generate

    times = [
        generate(engine, [(prompts(vocab_size, 1, size, seed)[0], 1)], GREEDY)
        for seed in range(CALLS + 1)
    ][1:]
    return {"ms": round(1e3 * statistics.median(times), 3), "ms_runs": [1e3 * t for t in times]}


def start(given: argparse.Namespace) -> None:
    """Prints a line after each figure of one engine."""
    from benchmarks import machine, offline_throughput
    from benchmarks.engine import dummy_engine
    from benchmarks.runs import Case

    vocab_size = workloads.SHAPES[given.model]["vocab_size"]
    options = {**LADDER, "precompile": True, **given.engine, "tp_size": given.tp[0]}
    uniform = Case(given.model, "uniform", 3, given.scale, options)

    def say(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    with dummy_engine(given.model, options, ["long"]) as (engine, startup):
        info = engine.get_server_info()
        say(tp=given.tp[0], startup_s=round(startup, 1), all_reduce=info["all_reduce"])
        say(memory_gib={name: round(use, 2) for name, use in info["memory_usage"].items()})
        for rows in given.rows:
            say(decode=rows, **decode(engine, vocab_size, rows, given.tokens))
        say(prefill=given.prompt, **prefill(engine, vocab_size, given.prompt))
        if given.scale:
            facts = offline_throughput.measure(engine, uniform).facts
            keys = ("output_tokens_per_s", "seconds", "host_ms_per_step", "late_compiles")
            say(uniform=facts["requests"], **{key: facts[key] for key in keys})
        say(**machine.describe())


def launch(given: argparse.Namespace, tp: int) -> dict[str, Any]:
    """What a process said of an engine on `tp` devices, as far as it came."""
    command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--in-this-process"]
    command += ["--model", given.model, "--tp", str(tp), "--engine", json.dumps(given.engine)]
    command += ["--rows", *map(str, given.rows)]
    for name in ("prompt", "tokens", "scale"):
        command += [f"--{name}", str(getattr(given, name))]
    child = children.run(command, given.seconds)
    result = gathered(tp, child.lines)
    if child.failed:
        result["failed"] = f"{child.errors[-3000:]}\n{child.failed}"
    return result


def gathered(tp: int, said: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What `start` said of an engine on `tp` devices."""
    result: dict[str, Any] = {"tp": tp, "decode": {}}
    for facts in said:
        if "decode" in facts:
            result["decode"][facts.pop("decode")] = facts
        elif case := next((name for name in ("prefill", "uniform") if name in facts), None):
            result[case] = {"size": facts.pop(case), **facts}
        else:
            result |= facts
    return result


def speedups(first: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of each figure that both have."""
    found = {}
    for rows in first["decode"].keys() & other["decode"].keys():
        found[f"decode {rows}"] = first["decode"][rows]["ms"] / other["decode"][rows]["ms"]
    if "prefill" in first and "prefill" in other:
        found["prefill"] = first["prefill"]["ms"] / other["prefill"]["ms"]
    if "uniform" in first and "uniform" in other:
        key = "output_tokens_per_s"
        found["uniform"] = other["uniform"][key] / first["uniform"][key]
    return {name: round(ratio, 3) for name, ratio in sorted(found.items())}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="devices")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of decode steps")
    parser.add_argument("--tokens", type=int, default=256, help="out of each decoding request")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--scale", type=float, default=1.0, help="share of uniform; 0: none of it")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    parser.add_argument("--seconds", type=int, default=200, help="of each engine's process")
    parser.add_argument("--out-dir", type=Path)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    given = arguments().parse_args()
    if given.in_this_process:
        start(given)
        return
    found: list[dict[str, Any]] = []
    for tp in given.tp:
        found.append(launch(given, tp))
        found[-1]["speedup"] = speedups(found[0], found[-1])
        print(json.dumps(found[-1]), flush=True)
    if given.out_dir:
        from benchmarks.machine import short_name

        described = [short_name(each) for each in found if "platform" in each]
        name = "_".join([*described[:1], given.model, "tensor_parallel"])
        given.out_dir.mkdir(parents=True, exist_ok=True)
        (given.out_dir / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if any("failed" in result for result in found):
        sys.exit("an engine failed")


if __name__ == "__main__":
    main()
