"""Check, time and tune every implementation of every kernel.

    python -m benchmarks.kernels --out kernels.json --budget 300
    python -m benchmarks.kernels --tune --out tune.json --tuning-out nvidia_h200.json
    python -m benchmarks.kernels --smoke                      # any CPU, tiny shapes, no meaning

First each implementation is compared with the float32 reference on large shapes; then timed. A time
is device time: several calls that depend on each other in one program, several programs queued, the
clock stopped when the last is done; median of such rounds, divided by the calls. Page tables rotate
through a pool far larger than the L2. Nothing is subtracted. "floor" is the larger of bytes over
the measured copy bandwidth and FLOPs over the measured matrix-product rate. A failing variant
prints its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import machine
from pallas_kernels import compat
from pallas_kernels.benchmark import Problem

OPERATIONS = ("paged_decode", "paged_prefill", "kv_write")
ROUNDS, QUEUED_SECONDS, LAST_SECONDS = 5, 0.02, 15.0
COMPILE_THREADS = 12


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
        self.checks: list[dict[str, Any]] = []
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

    # -- correctness ------------------------------------------------------------------------------

    def check(self, operation: str) -> None:
        cases = importlib.import_module(f"pallas_kernels.{operation}.cases")
        reference = getattr(
            importlib.import_module(f"pallas_kernels.{operation}.reference"), operation
        )
        chosen = cases.EDGES[2:4] if self.args.smoke else cases.LARGE
        for case in chosen:
            arrays = case.inputs(int(time.time()), jnp.bfloat16)
            window = getattr(case, "window", None)
            options = {} if operation == "kv_write" else {"window": window}
            want = reference(*arrays, **options)
            if operation != "kv_write":
                options["scale"] = case.head_dim**-0.5
            for name in self.names(operation):
                if self.left() < LAST_SECONDS:
                    return say("budget: checks cut short")
                try:
                    run = self.implementation(operation, name, {})
                    got = jax.jit(functools.partial(run, **options))(*arrays)
                    error = self.error(operation, case, got, want)
                    verdict = "ok" if error < 2e-2 else "WRONG"
                    text = f"{verdict}, largest relative error of a row {error:.1e}"
                except NotImplementedError as reason:
                    verdict, error, text = "refused", None, f"refused: {reason}"
                except Exception as failure:
                    verdict, error, text = "FAILED", None, f"FAILED {one_line(failure)}"
                say(f"check {operation:13s} {name:12s} {case.name:32s} {text}")
                self.checks.append(
                    {"operation": operation, "implementation": name, "case": case.name,
                     "verdict": verdict, "error": error}
                )  # fmt: skip

    @staticmethod
    def error(operation: str, case: Any, got: Any, want: Any) -> float:
        """Largest relative error of a row of one head; infinite where it is not finite."""
        if operation == "kv_write":
            same = all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
            return 0.0 if same else math.inf
        got = np.asarray(got).astype(np.float32)
        if operation == "paged_prefill":
            got, want = got[case.live()], want[case.live()]
        if not np.isfinite(got).all():
            return math.inf
        norm = np.maximum(np.linalg.norm(want, axis=-1), 1e-3)
        return float((np.linalg.norm(got - want, axis=-1) / norm).max(initial=0.0))

    # -- time -------------------------------------------------------------------------------------

    def compiled(self, problem: Problem, run: Callable, inputs: tuple) -> Any:
        def program(carry, fixed, rotating):
            for turn in rotating:
                carry = problem.step(run, carry, fixed, turn)
            return carry

        return jax.jit(program, donate_argnums=(0,)).lower(*inputs).compile()

    def seconds(self, problem: Problem, program: Any, inputs: tuple) -> float:
        """Median time of one call."""
        carry, fixed, rotating = inputs
        carry = jax.tree.map(jnp.copy, carry)
        carry = jax.block_until_ready(program(carry, fixed, rotating))
        started = time.perf_counter()
        carry = jax.block_until_ready(program(carry, fixed, rotating))
        once = time.perf_counter() - started
        queued = 1 if self.args.smoke else max(2, min(100, int(QUEUED_SECONDS / once)))
        times = []
        for _ in range(1 if self.args.smoke else ROUNDS):
            started = time.perf_counter()
            for _ in range(queued):
                carry = program(carry, fixed, rotating)
            jax.block_until_ready(carry)
            times.append((time.perf_counter() - started) / queued)
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
                    {"operation": operation, "shape": problem.name, "implementation": name,
                     "sizes": sizes, "features": problem.features, "us": seconds * 1e6,
                     "floor_us": floor * 1e6, "percent": 100 * floor / seconds}
                )  # fmt: skip
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
        if not self.args.tune:
            for operation in chosen:
                self.check(operation)
        for operation in chosen:
            bench = importlib.import_module(f"pallas_kernels.{operation}.bench")
            for problem in bench.smoke() if self.args.smoke else bench.problems():
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
        bad = [c for c in self.checks if c["verdict"] in ("WRONG", "FAILED")]
        say(f"{len(self.checks)} checks, {len(bad)} wrong or failed")

    def tuning(self) -> dict[str, Any]:
        """A tuning table of what was measured: for each head dim (and in decode, range of rows) the
        sizes with the least time relative to the floor, averaged over the shapes that have them."""
        entries = []
        groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
        for row in self.rows:
            features = row["features"]
            key = (row["operation"], row["implementation"], features["head_dim"],
                   features.get("batch", 0))  # fmt: skip
            groups.setdefault(key, []).append(row)
        for (operation, name, head_dim, batch), rows in groups.items():
            scores: dict[str, list[float]] = {}
            for row in rows:
                text = json.dumps(row["sizes"], sort_keys=True)
                scores.setdefault(text, []).append(row["us"] / row["floor_us"])
            most = max(map(len, scores.values()))
            full = {text: sum(s) / len(s) for text, s in scores.items() if len(s) == most}
            when: dict[str, Any] = {"head_dim": head_dim, "itemsize": 2}
            if batch:
                batches = sorted(k[3] for k in groups if k[:3] == (operation, name, head_dim))
                at = batches.index(batch)
                low = math.isqrt(batches[at - 1] * batch) + 1 if at else 1
                last = at + 1 == len(batches)
                when["batch"] = [low, 1 << 30 if last else math.isqrt(batch * batches[at + 1])]
            use = json.loads(min(full, key=lambda text: full[text]))
            if use:
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="write all results to this JSON file")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; stops cleanly")
    parser.add_argument("--only", nargs="*", choices=OPERATIONS, help="operations, default all")
    parser.add_argument("--implementations", nargs="*", help="names, default all")
    parser.add_argument("--tune", action="store_true", help="sweep sizes instead of checking")
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
            result = {"machine": machine.describe(), "bandwidth": bench.bandwidth,
                      "rate": bench.rate, "checks": bench.checks, "times": bench.rows}  # fmt: skip
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
        if args.tune:
            text = json.dumps(bench.tuning(), indent=2)
            say(text)
            if args.tuning_out:
                with open(args.tuning_out, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
        bench.table()
    return 1 if any(c["verdict"] == "WRONG" for c in bench.checks) else 0


if __name__ == "__main__":
    sys.exit(main())
