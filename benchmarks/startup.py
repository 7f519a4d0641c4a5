"""Seconds until an engine with random weights answers, in fresh processes: cold and warm.

    python -m benchmarks.startup --model llama-3.1-8b --out-dir results
    python -m benchmarks.startup --model demo       # on a CPU: the demo model, with its weights

Cold: nothing is compiled yet (an empty folder of programs). Warm: the same folder again. Files are
in the page cache either way, but for the first process's imports. Of each start:

    import_s        Python's imports, JAX's included
    weights_s       the device and the weights
    compile_s       programs, compiled in parallel, and the memory pool
    ready_s         from the process's start to a ready engine
    first_token_s   one token for a prompt of 128, after that (on a CPU its programs are compiled
                    or found on disk here)
    compiled        XLA compilations until then, not counting what JAX's cache had
    compile_thread_s  compile_s added up over the threads that compile
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import workloads

# Only the children touch JAX: a parent that did would hold the device's memory.

SET_BY_THE_ENVIRONMENT = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
"""Would replace the folder of programs that this benchmark chooses."""
DEMO = "demo"
"""examples/demo_model.py's, with a context that keeps the figures small."""
DEMO_OPTIONS = {"context_length": 2048}


def start(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of one start, measured in this process, which must be a fresh one."""
    begun = time.perf_counter()
    import converters  # noqa: F401  (the engine's own lazy imports, here by the clock)
    import jaxserve.loop  # noqa: F401

    imported = time.perf_counter()
    from benchmarks.engine import dummy_engine, generate

    count = count_compilations()
    opened = demo_engine(options) if model == DEMO else dummy_engine(model, options)
    with opened as (engine, constructor):
        ready_at = time.time()
        info = engine.get_server_info()
        vocabulary = engine.tokenizer_manager.model_config.vocab_size
        prompt = workloads.requests("lat1", vocabulary)[0][0]
        first = generate(engine, [(prompt, 1)], {"temperature": 0})
    from benchmarks import machine

    return {
        "import_s": imported - begun,
        "weights_s": constructor - info["startup_time"],
        "compile_s": info["startup_time"],
        "first_token_s": first,
        "compile_thread_s": info["compile_seconds"],
        "programs": info["programs"],
        "compiled": count(),
        "late_compiles": info["late_compiles"],
        "ready_at": ready_at,
        "machine": machine.describe(),
    }


@contextlib.contextmanager
def demo_engine(options: dict[str, Any]) -> Iterator[tuple[Any, float]]:
    """(engine, seconds its constructor took), as benchmarks.engine.dummy_engine."""
    import jaxserve
    from examples.demo_model import fetch

    path = str(fetch())
    started = time.perf_counter()
    with jaxserve.Engine(model_path=path, **{**DEMO_OPTIONS, **options}) as engine:
        yield engine, time.perf_counter() - started


def count_compilations() -> Callable[[], int]:
    """Counts from now on; what it returns says how many there were, without those that JAX's
    compilation cache spared."""
    import jax

    from jaxserve.compat import on_backend_compile

    made: list[float] = []
    found: list[str] = []

    def event(name: str, **_: Any) -> None:
        if name == "/jax/compilation_cache/cache_hits":
            found.append(name)

    on_backend_compile(made.append)
    jax.monitoring.register_event_listener(event)
    return lambda: len(made) - len(found)


def launch(model: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`start` in a new process that keeps its programs in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_THE_ENVIRONMENT}
    environment["CUDA_CACHE_PATH"] = str(folder / "cuda")
    options = {**options, "compilation_cache_dir": str(folder / "programs")}
    command = [sys.executable, "-m", "benchmarks.startup", "--model", model]
    command += ["--engine", json.dumps(options), "--in-this-process"]
    spawned = time.time()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    result = json.loads(output.splitlines()[-1])
    result["ready_s"] = result.pop("ready_at") - spawned
    rounded = {k: round(v, 3) for k, v in result.items() if isinstance(v, float)}
    return result | rounded


def run(
    model: str, options: dict[str, Any], rounds: int, kept: Path | None = None
) -> dict[str, Any]:
    """All starts: `rounds` times a cold one and then a warm one. The last round's programs go to
    `kept`."""
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    machine: dict[str, Any] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind in starts:
                result = launch(model, options, Path(folder))
                machine = result.pop("machine")
                starts[kind].append(result)
            if kept is not None:
                shutil.copytree(Path(folder) / "programs", kept, dirs_exist_ok=True)
    return {**machine, "benchmark": "startup", "model": model, "engine": options, **starts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llama-3.1-8b", choices=[DEMO, *sorted(workloads.SHAPES)]
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out-dir", type=Path, help="DEVICE_MODEL_startup.json goes here")
    parser.add_argument("--keep", type=Path, help="the programs go here: a compilation_cache_dir")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_this_process:
        print(json.dumps(start(given.model, given.engine)))
        return
    if "compilation_cache_dir" in given.engine:
        parser.error("--engine: compilation_cache_dir is what this benchmark varies")
    result = run(given.model, given.engine, given.rounds, given.keep)
    print(json.dumps(result), flush=True)
    if given.out_dir:
        from benchmarks.machine import short_name

        given.out_dir.mkdir(parents=True, exist_ok=True)
        file = given.out_dir / f"{short_name(result)}_{given.model}_startup.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
