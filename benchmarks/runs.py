"""Cases of one model, one after the other on a single engine, each into its own JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, workloads
from benchmarks.engine import Requests, dummy_engine


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of workloads.CASES on a shape; `scale` < 1 keeps a share of the requests. options:
    the engine's."""

    model: str
    name: str
    repeats: int
    scale: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, Any]:
        return workloads.sampling(self.name)

    def requests(self, seed: int, share: float = 1.0) -> Requests:
        vocab = workloads.SHAPES[self.model]["vocab_size"]
        return workloads.requests(self.name, vocab, seed, self.scale * share)


@dataclasses.dataclass(frozen=True)
class Measured:
    """facts: what goes into the JSON. The least `work` is compared with the time `seconds`."""

    facts: dict[str, Any]
    seconds: float
    work: machine.Work

    def against(self, ceilings: machine.Ceilings) -> dict[str, Any]:
        """The facts that need the machine's ceilings."""
        least = self.work.seconds(ceilings)
        return {
            "floor_ms": round(1e3 * least, 4),
            "share_of_floor": round(least / self.seconds, 4),
            "gb_per_s": round(self.work.bytes / self.seconds / 1e9, 1),
            "copy_gb_per_s": round(ceilings.bandwidth / 1e9, 1),
            "matmul_tflop_per_s": round(ceilings.rate / 1e12, 2),
        }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How its cases are measured, and how often unless the user says so."""

    name: str
    cases: tuple[str, ...]
    repeats: int
    measure: Callable[[Any, Case], Measured]


def variant(options: Mapping[str, Any]) -> list[str]:
    """What makes an engine with `options` compute something else: how it is quantized, what it does
    without, what it promises."""
    weights, pages = options.get("quantization"), options.get("kv_cache_dtype", "auto")
    found = {
        weights: weights,
        f"kv-{pages}": pages != "auto",
        "no-radix": options.get("disable_radix_cache"),
        "deterministic": options.get("enable_deterministic_inference"),
    }
    return [name for name, given in found.items() if name and given]


def run(
    benchmarks: Sequence[Benchmark],
    model: str,
    cases: Sequence[str],
    out_dir: Path | None,
    options: Mapping[str, Any],
    repeats: int | None = None,
    scale: float = 1.0,
) -> None:
    """Measures `cases` in their order on one engine with `options`. Writes each result to
    DEVICE_MODEL[_VARIANT]_CASE.json in `out_dir`: at once, and again with the ceilings, which are
    measured when the engine is gone; then prints it too. A case that fails does not keep the
    others from running. SystemExit: a case failed, or something was compiled in a timed run (on a
    CPU the engine compiles on first use unless its options say precompile)."""
    owners = {case: benchmark for benchmark in benchmarks for case in benchmark.cases}
    done: list[tuple[dict[str, Any], Measured]] = []
    troubles: list[str] = []

    def write(result: dict[str, Any]) -> None:
        if out_dir:
            parts = machine.short_name(result), model, *variant(options), result["case"]
            name = "_".join(parts) + ".json"
            out_dir.mkdir(parents=True, exist_ok=True)
            (out_dir / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with dummy_engine(model, options, cases) as (engine, startup):
        # Not before: asking for the device starts JAX, with its own limit of the memory.
        description = machine.describe()
        for name in cases:
            owner = owners[name]
            case = Case(model, name, repeats or owner.repeats, scale, options)
            try:
                # Whatever ran before must not help: a prefix cache forgets it.
                assert engine.flush_cache().success
                measured = owner.measure(engine, case)
            except Exception as error:
                traceback.print_exc()
                troubles.append(f"{name}: {type(error).__name__}: {error}")
                continue
            result = {
                **description,
                "benchmark": owner.name,
                "model": model,
                "case": name,
                # where programs lie is of this machine, and of no matter to the figures
                "engine": {k: v for k, v in options.items() if k != "compilation_cache_dir"},
                "context_length": workloads.context_length(model, cases),
                "scale": scale,
                "startup_seconds": round(startup, 2),
                **measured.facts,
            }
            done.append((result, measured))
            write(result)
            print(f"{name}: {measured.facts['seconds']} s", flush=True)
            if late := measured.facts["late_compiles"]:
                troubles.append(f"{name}: {late} programs were compiled during the timed runs")
    if done:
        ceilings = machine.Ceilings.measure()
        for result, measured in done:
            complete = result | measured.against(ceilings)
            write(complete)
            print(json.dumps(complete), flush=True)
    if troubles:
        sys.exit("\n".join(troubles))


def command(
    description: str | None, benchmarks: Sequence[Benchmark], argv: Sequence[str] | None = None
) -> None:
    """The command line of `run`."""
    known = [case for benchmark in benchmarks for case in benchmark.cases]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--cases", nargs="+", choices=known, default=known, metavar="CASE")
    parser.add_argument("--out-dir", type=Path, help="DEVICE_MODEL_CASE.json of each case go here")
    parser.add_argument("--repeats", type=int, help="timed runs of a case")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    if any(set(benchmark.cases) & set(workloads.THROUGHPUT) for benchmark in benchmarks):
        parser.add_argument("--scale", type=float, default=1.0, help="share of the requests")
    given = vars(parser.parse_args(argv))
    options = given.pop("engine")
    run(benchmarks, options=options, **given)
