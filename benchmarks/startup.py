"""Seconds until an engine with random weights answers, in fresh processes: cold and warm.

    python -m benchmarks.startup --model llama-3.1-8b --out-dir results
    python -m benchmarks.startup --model demo       # on a CPU: the demo model, with its weights
    python -m benchmarks.startup --model llama-3.1-8b --load   # and what requests meet meanwhile

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

These starts do not wait until everything is compiled (with --keep they do, and with
--engine '{"wait_until_compiled": true}'). With --load a third one, `rest`, does; and each goes on:
the cold and the warm one at once with 64 streams of all lengths, beside which the cold one compiles
most of its programs:

    load            requests, seconds, and the longest pause between two chunks of a stream
    complete_s      from the process's start until every program was there
    untimed         programs whose kernels were chosen without timing them
    latency         ms a token of lat1 and lat8 after that, of five calls each
    timed_s         from then on, until the engine at rest had timed those kernels as well (absent
                    where it took longer than TIMING_SECONDS)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
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
TIMING_SECONDS = 120
"""What an engine at rest may take to time what it compiled beside requests."""


def start(model: str, options: dict[str, Any], load: bool) -> dict[str, Any]:
    """The figures of one start, measured in this process, which must be a fresh one. load: go on
    after the first token."""
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
        compiled = count()
        further = go_on(engine, options) if load else {}
    from benchmarks import machine

    return {
        "import_s": imported - begun,
        "weights_s": constructor - info["startup_time"],
        "compile_s": info["startup_time"],
        "first_token_s": first,
        "compile_thread_s": info["compile_seconds"],
        "programs": info["programs"],
        "compiled": compiled,
        "late_compiles": info["late_compiles"],
        **further,
        "ready_at": ready_at,
        "machine": machine.describe(),
    }


def go_on(engine: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What requests meet while programs are compiled, and afterwards."""
    result: dict[str, Any] = {}
    if not options["wait_until_compiled"]:
        result["load"] = streams(engine)
    while engine.get_server_info()["programs_compiling"]:
        time.sleep(0.05)
    result["complete_at"] = time.time()
    result["latency"] = {case: token_ms(engine, case) for case in ("lat1", "lat8")}
    info = engine.get_server_info()
    result["all_programs"], result["untimed"] = info["programs"], info["programs_untimed"]
    since = time.perf_counter()
    while (seconds := time.perf_counter() - since) < TIMING_SECONDS:
        if not engine.get_server_info()["programs_untimed"]:
            result["timed_s"] = round(seconds, 1)
            break
        time.sleep(0.2)
    result["late_compiles"] = engine.get_server_info()["late_compiles"]
    return result


def token_ms(engine: Any, case: str) -> list[float]:
    """Milliseconds a token in each of five calls of `case`, after one that is not counted."""
    from benchmarks.engine import generate

    found = []
    for seed in range(6):
        items = workloads.requests(case, engine._loop.limits.vocab_size, seed)
        first = generate(engine, [(ids[::-1], 1) for ids, _ in items], {"temperature": 0})
        whole = generate(engine, items, {"temperature": 0})
        found.append(round(1e3 * (whole - first) / (items[0][1] - 1), 4))
    return found[1:]


def streams(engine: Any) -> dict[str, Any]:
    """64 requests of all lengths at once, some of which sample or want logprobs."""
    draw = random.Random(0)
    limits = engine._loop.limits
    sizes = [draw.choice((10, 60, 200, 500, 1500)) for _ in range(64)]
    prompts = [workloads.random_ids(draw, limits.vocab_size, size) for size in sizes]
    params = [
        {
            "temperature": row % 2,
            "top_p": 0.9,
            "ignore_eos": True,
            "max_new_tokens": 16 * (1 + row % 16),
        }
        for row in range(64)
    ]
    since = time.perf_counter()
    last: dict[int, float] = {}
    longest = 0.0
    for chunk in engine.generate(
        input_ids=prompts,
        sampling_params=params,
        stream=True,
        return_logprob=[row % 4 == 0 for row in range(64)],
        logprob_start_len=[0 if row % 8 == 0 else -1 for row in range(64)],
    ):
        now = time.perf_counter()
        if chunk["index"] in last:
            longest = max(longest, now - last[chunk["index"]])
        last[chunk["index"]] = now
    seconds = time.perf_counter() - since
    return {"requests": 64, "seconds": round(seconds, 3), "longest_pause_s": round(longest, 4)}


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


def launch(model: str, options: dict[str, Any], folder: Path, load: bool) -> dict[str, Any]:
    """`start` in a new process that keeps its programs in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_THE_ENVIRONMENT}
    environment["CUDA_CACHE_PATH"] = str(folder / "cuda")
    options = {**options, "compilation_cache_dir": str(folder / "programs")}
    command = [sys.executable, "-m", "benchmarks.startup", "--model", model]
    command += ["--engine", json.dumps(options), "--in-this-process"]
    command += ["--load"] if load else []
    spawned = time.time()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    result = json.loads(output.splitlines()[-1])
    for event in ("ready", "complete"):
        if f"{event}_at" in result:
            result[f"{event}_s"] = result.pop(f"{event}_at") - spawned
    rounded = {k: round(v, 3) for k, v in result.items() if isinstance(v, float)}
    return result | rounded


def run(
    model: str,
    options: dict[str, Any],
    rounds: int,
    kept: Path | None = None,
    load: bool = False,
) -> dict[str, Any]:
    """All starts: `rounds` times a cold one and then a warm one, with `load` after one that waits
    for its programs. The last round's programs go to `kept`."""
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    machine: dict[str, Any] = {}
    options = {"wait_until_compiled": kept is not None, **options}
    for _ in range(rounds):
        if load:
            with tempfile.TemporaryDirectory() as folder:
                waiting = {**options, "wait_until_compiled": True}
                rest = launch(model, waiting, Path(folder), load)
                del rest["machine"]
                starts.setdefault("rest", []).append(rest)
            options = {**options, "wait_until_compiled": False}
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("cold", "warm"):
                result = launch(model, options, Path(folder), load)
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
    parser.add_argument("--load", action="store_true", help="go on after the first token")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_this_process:
        print(json.dumps(start(given.model, given.engine, given.load)))
        return
    if "compilation_cache_dir" in given.engine:
        parser.error("--engine: compilation_cache_dir is what this benchmark varies")
    result = run(given.model, given.engine, given.rounds, given.keep, given.load)
    print(json.dumps(result), flush=True)
    if given.out_dir:
        from benchmarks.machine import short_name

        given.out_dir.mkdir(parents=True, exist_ok=True)
        file = given.out_dir / f"{short_name(result)}_{given.model}_startup.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
