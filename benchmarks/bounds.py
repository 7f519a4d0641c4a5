"""What the worst that users can hand in costs: seconds and MiB until it is refused, each in a
process of its own, and how long others wait meanwhile.

    python -m benchmarks.bounds [--cases header prompt ...] [--out result.json]

header: a safetensors header of 10**6 tensors. samples: n=10**6. prompt: 5 MB of text against a
context of 128 tokens. template: a chat template that loops. stop_regex: one that backtracks.
waits_*: while another thread encodes 5 MB (with allow_auto_truncate, which needs all tokens) or
renders such a template, the longest of the calls of `generate(input_ids=..., max_new_tokens=1)`
that began meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 240
"""Seconds for one case."""
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BACKTRACKS = "((?:.|\n)+)+\x00$"
OPTIONS = {
    "context_length": 128,
    "max_running_requests": 4,
    "max_total_tokens": 1024,
    "max_queued_requests": 4,
    "precompile": False,
    "dtype": "float32",
}
SHORT = {"max_new_tokens": 1, "temperature": 0}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, MiB beyond the peak so far, and how it ended."""
    before, started = peak_mib(), time.perf_counter()
    try:
        run()
        ended, message = "answered", ""
    except Exception as error:
        ended, message = type(error).__name__, str(error)
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "mib": round(peak_mib() - before, 1),
        "ended": ended,
        "message": message[:120],
        "message_characters": len(message),
    }


def longest_wait(engine: Any, busy: Callable[[], Any]) -> dict[str, Any]:
    """The longest call of other threads that began while `busy` ran, after a warm-up."""
    for _ in range(3):
        engine.generate(input_ids=[5, 6], sampling_params=SHORT)
    result: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: result.append(cost(busy)))
    waits = []
    thread.start()
    while thread.is_alive():
        started = time.perf_counter()
        engine.generate(input_ids=[5, 6], sampling_params=SHORT)
        waits.append(time.perf_counter() - started)
    thread.join()
    return {**result[0], "calls": len(waits), "longest_wait": round(max(waits, default=0.0), 4)}


def million_tensors(folder: Path) -> Path:
    """A copy of the checkpoint whose header has 10**6 tensors more."""
    copy = folder.parent / "million"
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    more = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}
    text = json.dumps(header | more).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return copy


def case(name: str, folder: Path) -> dict[str, Any]:
    import jaxserve

    def load(path: Path, **options: Any) -> Any:
        return jaxserve.Engine(model_path=str(path), **{**OPTIONS, **options})

    if name == "header":
        copy = million_tensors(folder)
        load(folder).shutdown()  # what any engine costs
        return cost(lambda: load(copy))
    options = {
        "chat_template": LOOP if name.endswith("template") else None,
        "allow_auto_truncate": name == "waits_prompt",
    }
    with load(folder, **options) as engine:
        for length in (1, OPTIONS["context_length"] - 1):
            # the shortest and the longest prompt: compiled before, not while others wait
            engine.generate(input_ids=[5] * length, sampling_params=SHORT)
        text = "The quick brown fox jumps. " * (5_000_000 // 27)
        chat = [{"role": "user", "content": "hi"}]
        match name:
            case "samples":
                return cost(lambda: engine.generate("a", {"n": 10**6}))
            case "prompt":
                return cost(lambda: engine.generate(text, SHORT))
            case "template":
                return cost(lambda: engine.chat(chat, SHORT))
            case "stop_regex":
                params = {"stop_regex": [BACKTRACKS], "max_new_tokens": 40, "ignore_eos": True}
                return cost(lambda: engine.generate("a", params))
            case "waits_prompt":
                return longest_wait(engine, lambda: engine.generate(text, SHORT))
            case "waits_template":
                return longest_wait(engine, lambda: engine.chat(chat, SHORT))
    raise ValueError(name)


CASES = ("header", "samples", "prompt", "template", "stop_regex", "waits_prompt", "waits_template")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        print(json.dumps(case(options.cases[0], Path(options.child))))
        return

    from benchmarks import machine
    from tests.checkpoints import make_checkpoint

    result: dict[str, Any] = {**machine.describe(), "benchmark": "bounds"}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_checkpoint(Path(scratch) / "model")
            command = [sys.executable, "-m", "benchmarks.bounds", "--cases", name]
            try:
                done = subprocess.run(
                    [*command, "--child", folder], capture_output=True, text=True, timeout=LIMIT
                )
                result[name] = (
                    json.loads(done.stdout) if done.returncode == 0 else done.stderr[-300:]
                )
            except subprocess.TimeoutExpired:
                result[name] = f"no end after {LIMIT} s"
        print(f"{name:15s} {result[name]}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
