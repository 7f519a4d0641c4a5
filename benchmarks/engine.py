"""An engine with random weights, calls on it by the clock, and what it counted meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jaxserve
from benchmarks import workloads

Requests = list[tuple[list[int], int]]
"""Prompt token ids and output length of each."""


@contextlib.contextmanager
def dummy_engine(
    model: str, options: Mapping[str, Any], cases: Iterable[str] = ()
) -> Iterator[tuple[jaxserve.Engine, float]]:
    """(engine of shape `model` with Engine `options`, seconds its constructor took). Its context is
    long enough for `cases`, and all its programs are compiled. Afterwards the device's memory is
    free again."""
    options = {"wait_until_compiled": True, "skip_tokenizer_init": True, **options}
    with tempfile.TemporaryDirectory() as root:
        folder = workloads.write_model(model, Path(root), cases)
        started = time.perf_counter()
        engine = jaxserve.Engine(model_path=str(folder), load_format="dummy", **options)
        try:
            yield engine, time.perf_counter() - started
        finally:
            engine.shutdown()
            gc.collect()  # a reference cycle would keep the weights on the device


@dataclasses.dataclass
class Counts:
    """What requests' meta_info says, summed."""

    retractions: int = 0
    cached_tokens: int = 0


def generate(
    engine: Any,
    items: Requests,
    sampling: Mapping[str, Any],
    counts: Counts | None = None,
    **options: Any,
) -> float:
    """Seconds of one call over `items`; every request must give its full length. options: further
    ones of the call."""
    params = [{**sampling, "max_new_tokens": out, "ignore_eos": True} for _, out in items]
    started = time.perf_counter()
    results = engine.generate(
        input_ids=[ids for ids, _ in items], sampling_params=params, **options
    )
    seconds = time.perf_counter() - started
    assert [len(r["output_ids"]) for r in results] == [out for _, out in items]
    if counts is not None:
        counts.retractions += sum(r["meta_info"]["num_retractions"] for r in results)
        counts.cached_tokens += sum(r["meta_info"]["cached_tokens"] for r in results)
    return seconds


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], counts: Counts
) -> dict[str, Any]:
    """What happened between two `get_server_info()`: the steps and the host's time for each, the
    compilations (none is wanted), `counts`, and the state at the end."""
    extend, decode = (after[key] - before[key] for key in ("extend_steps", "decode_steps"))
    phases = {
        name: 1e3 * (seconds - before["host_seconds"][name]) / (extend + decode)
        for name, seconds in after["host_seconds"].items()
    }
    # A first use without precompilation is no late compile to the engine; to a timed run it is.
    compiled = max(after[key] - before[key] for key in ("late_compiles", "programs"))
    return {
        "extend_steps": extend,
        "decode_steps": decode,
        "host_ms_per_step": round(sum(phases.values()), 4),
        "host_ms_by_phase": {name: round(ms, 4) for name, ms in phases.items()},
        "late_compiles": compiled,
        **dataclasses.asdict(counts),
        "programs": after["programs"],
        "memory_gib": {name: round(use, 3) for name, use in after["memory_usage"].items()},
    }
