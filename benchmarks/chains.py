"""What chains of transforms cost: a decode step with and without, and a registration under load.

    python -m benchmarks.chains --model llama-3.1-8b --rows 1 64 256 --out-dir results
    python -m benchmarks.chains --model qwen2.5-0.5b --rows 64 256 --fuse
    python -m benchmarks.chains --model tiny --rows 1 4 --tokens 16 --streams 4

One engine. By rows, calls in turns, plain, with each chain, plain again, `--calls` times: ms a
token (128 in, `--tokens` out, greedy) and the ratio of medians to the plain one. The chains:

    same        changes nothing: what drawing apart costs
    five        temperature, top-n-sigma, min-p, epsilon and exponential decay
    typical_p, top_h, dry     those that search or look back

With `--fuse` they are registered with `fuse=True`.

"register": while `--streams` requests decode, ms between their tokens before, and while a chain is
compiled beside them; late compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, workloads
from benchmarks.engine import dummy_engine, generate
from benchmarks.tensor_parallel import prompts
from jaxserve import transforms
from jaxserve.transforms import Transform

GREEDY = {"temperature": 0}


def chains() -> dict[str, tuple[Transform, dict[str, Any]]]:
    """By name: the chain, and parameters with which it has work."""
    five = transforms.chain(
        transforms.temperature(),
        transforms.top_n_sigma(),
        transforms.min_p(),
        transforms.epsilon_cutoff(),
        transforms.exponential_decay_length([2]),
    )
    decays = {"decay_start": 4, "decay_factor": 1.01}
    cuts = {"top_n_sigma": 2.0, "min_p": 0.01, "epsilon_cutoff": 1e-4}
    return {
        "same": (Transform(lambda logits, state, params, context: logits), {}),
        "five": (five, {"temperature": 0.8, **cuts, **decays}),
        "typical_p": (transforms.typical_p(), {"typical_p": 0.9}),
        "top_h": (transforms.top_h(), {"top_h": 0.4}),
        "dry": (transforms.dry(), {"dry_multiplier": 0.8}),
    }


def decode(engine: Any, vocab_size: int, rows: int, tokens: int, calls: int) -> dict[str, Any]:
    """Ms a token of so many rows, by chain; "plain" without."""
    asked: dict[str, dict[str, Any]] = {"plain": GREEDY}
    for name, (_, params) in chains().items():
        asked[name] = {**GREEDY, "transform": name, "transform_params": params}

    def call(name: str, seed: int, out: int) -> float:
        ids = prompts(vocab_size, rows, 128, seed)
        return generate(engine, [(each, out) for each in ids], asked[name])

    times: dict[str, list[float]] = {name: [] for name in asked}
    for name in asked:
        call(name, -1, 4)
    for turn in range(calls):
        for name in asked:
            seconds = call(name, 2 * turn, tokens) - call(name, 2 * turn + 1, 1)
            times[name].append(round(1e3 * seconds / (tokens - 1), 4))
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "rows": rows,
        "ms": medians,
        "ratio": {name: round(each / medians["plain"], 4) for name, each in medians.items()},
        "ms_runs": times,
    }


def register(engine: Any, vocab_size: int, streams: int, tokens: int) -> dict[str, Any]:
    """Ms between the tokens of `streams` plain requests, at rest and while a new chain is compiled
    beside them."""
    ids = prompts(vocab_size, streams, 128, 77)
    params = {**GREEDY, "max_new_tokens": tokens, "ignore_eos": True}
    late = engine.get_server_info()["late_compiles"]
    arrived: list[float] = []
    span: list[float] = []

    def compile_one() -> None:
        span.append(time.perf_counter())
        number = time.time_ns() % 1_000_003  # computes what no chain before has
        engine.register(f"new {number}", Transform(lambda x, s, p, c: x + number * 1e-9))
        span.append(time.perf_counter())

    thread = threading.Thread(target=compile_one)
    for chunk in engine.generate(input_ids=ids, sampling_params=params, stream=True):
        if chunk["index"] == 0:
            arrived.append(time.perf_counter())
            if len(arrived) == tokens // 8:
                thread.start()
    thread.join()
    gaps, at = 1e3 * np.diff(arrived), np.array(arrived[1:])
    beside = (at > span[0]) & (at < span[1] + 0.1)
    quiet = gaps[~beside][2:]
    return {
        "streams": streams,
        "seconds": round(span[1] - span[0], 2),
        "ended_before_it": bool(span[1] > arrived[-1]),
        "ms_at_rest": {"median": _ms(np.median(quiet)), "p99": _ms(np.quantile(quiet, 0.99))},
        "ms_beside": {
            "median": _ms(np.median(gaps[beside])),
            "p99": _ms(np.quantile(gaps[beside], 0.99)),
            "most": _ms(gaps[beside].max()),
        },
        "late_compiles": engine.get_server_info()["late_compiles"] - late,
    }


def _ms(value: Any) -> float:
    return round(float(value), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--fuse", action="store_true", help="register chains with fuse=True")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--stream-tokens", type=int, default=1024)
    parser.add_argument("--engine", type=json.loads, default={}, help="Engine options, JSON")
    parser.add_argument("--out-dir", type=Path)
    given = parser.parse_args()
    vocab_size = workloads.SHAPES[given.model]["vocab_size"]
    result: dict[str, Any] = {"benchmark": "chains", "model": given.model, "fuse": given.fuse}
    with dummy_engine(given.model, {"precompile": True, **given.engine}, ["long"]) as (engine, _):
        seconds = {}
        for name, (transform, _) in chains().items():
            started = time.perf_counter()
            engine.register(name, transform, fuse=given.fuse)
            seconds[name] = round(time.perf_counter() - started, 2)
        result["register_s"] = seconds
        print(json.dumps(result), flush=True)
        result["decode"] = []
        for rows in given.rows:
            found = decode(engine, vocab_size, rows, given.tokens, given.calls)
            print(json.dumps(found), flush=True)
            result["decode"].append(found)
        result["register"] = register(engine, vocab_size, given.streams, given.stream_tokens)
        print(json.dumps(result["register"]), flush=True)
        result |= machine.describe()
    if given.out_dir is not None:
        given.out_dir.mkdir(parents=True, exist_ok=True)
        path = given.out_dir / f"chains-{given.model}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
