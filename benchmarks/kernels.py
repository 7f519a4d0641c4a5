"""Time and tune every implementation of every kernel (tests/test_kernels_*.py check them).

    python -m benchmarks.kernels --out kernels.json --budget 300
    python -m benchmarks.kernels --tune --out tune.json --tuning-out nvidia_h200.json
    python -m benchmarks.kernels --smoke                      # any CPU, tiny shapes, no meaning

A time is device time off a profiler's trace: several calls that depend on each other in one
program, from the start of the first kernel to the end of the last, median of several runs, divided
by the calls. Inputs rotate through memory far larger than the L2. Nothing is subtracted. "floor" is
the larger of bytes over the measured copy bandwidth and FLOPs over the measured matrix-product
rate. A failing variant prints its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import machine, trace
from pallas_kernels import compat
from pallas_kernels.benchmark import Problem

OPERATIONS = tuple(pallas_kernels.operations())
ROUNDS, LAST_SECONDS = 5, 15.0
COMPILE_THREADS = 12
SCALES = ("batch", "rows", "tokens")


def say(*words: object) -> None:
    print(*words, flush=True)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " | ")[:300]


class Bench:
    """One run: arguments, budget, results so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.bandwidth = self.rate = math.nan

    def left(self) -> float:
        return self.args.budget - (time.perf_counter() - self.started)

    def implementation(self, operation: str, name: str, sizes: dict[str, int]) -> Callable:
        entry = pallas_kernels.operations()[operation].find(name)
        if not self.args.smoke and (reason := entry.refusal(pallas_kernels.current_device())):
            raise NotImplementedError(reason)
        home = importlib.import_module(entry.module)
        options: dict[str, Any] = {}
        if sizes:
            options["sizes"] = home.Sizes(**sizes)
        if self.args.smoke and name != "xla":
            mosaic = name.startswith("mosaic")
            options["interpret"] = compat.mosaic_interpreter() if mosaic else True
        return functools.partial(getattr(home, operation), **options)

    def names(self, operation: str) -> list[str]:
        known = [e.name for e in pallas_kernels.operations()[operation].implementations]
        wanted = self.args.implementations
        return [name for name in known if not wanted or name in wanted]

    # -- time -------------------------------------------------------------------------------------

    def compiled(self, problem: Problem, run: Callable, inputs: tuple) -> Any:
        step = jax.jit(functools.partial(problem.step, run))  # all calls share one lowered kernel

        def program(carry, fixed, rotating):
            for turn in rotating:
                carry = step(carry, fixed, turn)
            return carry

        return jax.jit(program, donate_argnums=(0,)).lower(*inputs).compile()

    def seconds(self, problem: Problem, program: Any, inputs: tuple) -> float:
        """Median time of one call."""
        carry, fixed, rotating = inputs
        carry = jax.tree.map(jnp.copy, carry)

        def run() -> Any:
            nonlocal carry
            carry = program(carry, fixed, rotating)
            return carry

        jax.block_until_ready(run())
        if self.args.smoke:
            return machine.median_seconds(lambda: jax.block_until_ready(run()), 1) / problem.calls
        times = trace.traced_seconds(run, ROUNDS)
        return sorted(times)[len(times) // 2] / problem.calls

    def variants(self, operation: str, problem: Problem) -> list[tuple[str, dict[str, int]]]:
        bench = importlib.import_module(f"pallas_kernels.{operation}.bench")
        found: list[tuple[str, dict[str, int]]] = []
        for name in self.names(operation):
            sweep = bench.sweep(name, problem.features) if self.args.tune else []
            if not self.args.tune:
                found.append((name, {}))
            found += [(name, sizes) for sizes in sweep]
        return found

    def time_problem(self, operation: str, problem: Problem) -> None:
        variants = self.variants(operation, problem)
        if not variants:
            return
        floor = max(problem.bytes / self.bandwidth, problem.flops / self.rate)
        inputs = problem.build(jax.random.key(int(time.time())))
        jax.block_until_ready(inputs)
        threads = 1 if self.args.smoke else COMPILE_THREADS
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            futures = []
            for name, sizes in variants:
                task = functools.partial(self.build_variant, operation, problem, name, sizes)
                futures.append(pool.submit(task, inputs))
            for (name, sizes), future in zip(variants, futures, strict=True):
                if self.left() < LAST_SECONDS:
                    return say("budget: timing cut short")
                label = " ".join(f"{key}={value}" for key, value in sizes.items())
                head = f"time  {operation:13s} {problem.name:26s} {name:12s} {label}"
                try:
                    program = future.result(timeout=self.left() - LAST_SECONDS / 2)
                    seconds = self.seconds(problem, program, inputs)
                except NotImplementedError as reason:
                    say(f"{head} refused: {reason}")
                    continue
                except Exception as failure:
                    say(f"{head} FAILED {one_line(failure)}")
                    continue
                say(
                    f"{head} {seconds * 1e6:9.1f} us {100 * floor / seconds:5.1f}% of floor "
                    f"{problem.bytes / seconds / 1e9:6.0f} GB/s "
                    f"{problem.flops / seconds / 1e12:6.1f} TFLOP/s"
                )
                self.rows.append(
                    {
                        "operation": operation,
                        "shape": problem.name,
                        "implementation": name,
                        "sizes": sizes,
                        "features": problem.features,
                        "us": seconds * 1e6,
                        "floor_us": floor * 1e6,
                        "percent": 100 * floor / seconds,
                    }
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def build_variant(
        self, operation: str, problem: Problem, name: str, sizes: dict[str, int], inputs: tuple
    ) -> Any:
        return self.compiled(problem, self.implementation(operation, name, sizes), inputs)

    # -- the whole --------------------------------------------------------------------------------

    def run(self) -> None:
        device = jax.devices()[0]
        self.bandwidth, self.rate = machine.copy_bandwidth(), machine.matmul_rate()
        say(
            f"{device.device_kind}, jax {jax.__version__}: copy {self.bandwidth / 1e12:.2f} TB/s, "
            f"product {self.rate / 1e12:.0f} TFLOP/s"
        )
        chosen = [name for name in OPERATIONS if not self.args.only or name in self.args.only]
        for operation in chosen:
            bench = importlib.import_module(f"pallas_kernels.{operation}.bench")
            problems = bench.smoke() if self.args.smoke else bench.problems()
            for problem in (p for p in problems if re.search(self.args.shapes, p.name)):
                if self.left() < LAST_SECONDS:
                    say("budget: stopped before", operation, problem.name)
                    break
                try:
                    self.time_problem(operation, problem)
                except Exception as failure:
                    say(f"time  {operation:13s} {problem.name:26s} FAILED {one_line(failure)}")

    def table(self) -> None:
        """The best time of each implementation, one line a shape."""
        shapes: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            best = shapes.setdefault((row["operation"], row["shape"]), {})
            name = row["implementation"]
            if name not in best or row["us"] < best[name]["us"]:
                best[name] = row
        say("\nbest of each implementation, us a call (share of the floor)")
        for (operation, shape), best in shapes.items():
            floor = next(iter(best.values()))["floor_us"]
            cells = [f"{n} {r['us']:.1f} ({r['percent']:.0f}%)" for n, r in best.items()]
            say(f"{operation:13s} {shape:26s} floor {floor:8.1f}   " + "   ".join(cells))

    def tuning(self) -> dict[str, Any]:
        """A tuning table of what was measured. Shapes that agree in the features which the
        operation's bench names (TUNED_BY, all if it names none) share their sizes: those with the
        least time relative to the floor, on average. The first feature of SCALES that a shape has
        makes ranges, with bounds half-way between those measured."""
        groups: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
        for row in self.rows:
            bench = importlib.import_module(f"pallas_kernels.{row['operation']}.bench")
            features = row["features"]
            scale = next(name for name in SCALES if name in features)
            kept = getattr(bench, "TUNED_BY", tuple(name for name in features if name != scale))
            key = (
                row["operation"],
                row["implementation"],
                scale,
                tuple((name, features[name]) for name in kept),
            )
            groups.setdefault(key, {}).setdefault(features[scale], []).append(row)
        entries = []
        for (operation, name, scale, kept), by_scale in groups.items():
            values = sorted(by_scale)
            bounds = [1, *(math.isqrt(a * b) + 1 for a, b in itertools.pairwise(values)), 1 << 30]
            for low, high, value in zip(bounds, bounds[1:], values, strict=False):
                use = _best_sizes(by_scale[value])
                if use:
                    when = {**dict(kept), scale: [low, high - 1]}
                    entries.append(
                        {"operation": operation, "implementation": name, "when": when, "use": use}
                    )
        device = jax.devices()[0]
        return {
            "device_kinds": [device.device_kind],
            "measured": f"{device.device_kind}, jax {jax.__version__}, {time.strftime('%F')}, "
            "benchmarks/kernels.py --tune",
            "entries": entries,
        }


def _best_sizes(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Of the sizes that ran on every shape of `rows`."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        text = json.dumps(row["sizes"], sort_keys=True)
        scores.setdefault(text, []).append(row["us"] / row["floor_us"])
    most = max(map(len, scores.values()))
    full = {text: sum(s) / len(s) for text, s in scores.items() if len(s) == most}
    return json.loads(min(full, key=lambda text: full[text]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="write all results to this JSON file")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; stops cleanly")
    parser.add_argument("--only", nargs="*", choices=OPERATIONS, help="operations, default all")
    parser.add_argument("--implementations", nargs="*", help="names, default all")
    parser.add_argument("--shapes", default="", help="regular expression of the shapes' names")
    parser.add_argument("--tune", action="store_true", help="sweep sizes")
    parser.add_argument("--tuning-out", help="with --tune: write the best sizes to this JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpreted, on a CPU")
    args = parser.parse_args(argv)
    if args.tuning_out and not args.tune:
        parser.error("--tuning-out needs --tune")
    bench = Bench(args)
    try:
        bench.run()
    finally:  # what was measured is worth keeping, whatever happened after
        if args.out:
            result = {
                "machine": machine.describe(),
                "bandwidth": bench.bandwidth,
                "rate": bench.rate,
                "times": bench.rows,
            }
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
        if args.tune:
            text = json.dumps(bench.tuning(), indent=2)
            say(text)
            if args.tuning_out:
                with open(args.tuning_out, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
        bench.table()


if __name__ == "__main__":
    main()
