"""Batch jobs with one engine and with several: rows and output tokens a second.

    python -m benchmarks.batch_jobs --model qwen2.5-0.5b --engines 1 2
    python -m benchmarks.batch_jobs --model qwen2.5-0.5b --engines 2 --kill

Each engine has `--rows` rows of (512 in, 256 out), token ids in, random weights: with twice the
engines there are twice the rows. Each job is the command line in a process of its own; the time is
from the first row read to the last part written, of which the report keeps the moments. --kill ends
one engine's process in the middle, and then all rows must be there once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import workloads

PROMPT, OUTPUT = 512, 256


def write_rows(path: Path, rows: int, vocab_size: int) -> None:
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            ids = workloads.random_ids(draw, vocab_size, PROMPT)
            file.write(json.dumps({"input_ids": ids}) + "\n")


def measure(model: str, engines: int, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one job."""
    with tempfile.TemporaryDirectory() as root:
        rows = given.rows * engines
        folder = workloads.write_model(model, Path(root))
        path, out = Path(root) / "rows.jsonl", Path(root) / "out"
        write_rows(path, rows, workloads.SHAPES[model]["vocab_size"])
        sampling = {"temperature": 0, "max_new_tokens": OUTPUT, "ignore_eos": True}
        command = [
            *(sys.executable, "-m", "jaxserve.batch", "--model", str(folder)),
            *("--input", str(path), "--output", str(out), "--runner", given.runner),
            *("--dp-size", str(engines), "--tp-size", str(given.tp_size)),
            *("--load-format", "dummy", "--skip-tokenizer-init"),
            *("--sampling-params", json.dumps(sampling), *given.options),
        ]
        started = time.perf_counter()
        job = subprocess.Popen(command)
        if given.kill:
            kill_one(job, out)
        if job.wait() != 0:
            raise RuntimeError(f"the job ended with status {job.returncode}")
        seconds = time.perf_counter() - started
        counted = json.loads((out / "_job" / "report.json").read_text())
        check(out, rows)
    span = counted["ended"] - counted["started"]
    return {
        "model": model,
        "engines": engines,
        "tp_size": given.tp_size,
        "runner": given.runner,
        "killed": given.kill,
        "rows": rows,
        "seconds": seconds,
        "generating_seconds": span,
        "output_tokens_per_s": counted["completion_tokens"] / span,
    }


def kill_one(job: subprocess.Popen[bytes], out: Path) -> None:
    """Ends an engine's process once a part is done. (The resource tracker is none.)"""
    while not list(out.glob("part-*")):
        if job.poll() is not None:
            raise RuntimeError("the job ended before anything was killed")
        time.sleep(0.05)
    victims = [pid for pid in children(job.pid) if "spawn_main" in command_line(pid)]
    os.kill(victims[0], signal.SIGKILL)
    print(f"killed process {victims[0]}", flush=True)


def children(parent: int) -> Iterator[int]:
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                yield int(place.name)


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def check(out: Path, rows: int) -> None:
    """Raises RuntimeError unless each row is there once, and whole."""
    parts = [path.read_text(encoding="utf-8") for path in out.glob("part-*")]
    found = [json.loads(line) for part in parts for line in part.splitlines()]
    whole = [row["index"] for row in found if row["completion_tokens"] == OUTPUT]
    if sorted(whole) != list(range(rows)) or len(found) != rows:
        raise RuntimeError(f"{len(found)} rows of {rows} are there, {len(whole)} of them whole")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(workloads.SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2048, help="for each engine")
    parser.add_argument("--runner", choices=("local", "ray"), default="local")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    parser.add_argument("options", nargs="*", help="behind --: of the job, as on its command line")
    given = parser.parse_args()
    if given.kill and 1 in given.engines:
        parser.error("--kill needs engines in processes of their own: --engines 2")
    results = [measure(given.model, engines, given) for engines in given.engines]
    first = results[0]["output_tokens_per_s"] / results[0]["engines"]
    for result in results:
        result["of_one"] = result["output_tokens_per_s"] / first
        print(
            f"{result['engines']} engines: {result['rows']:,} rows in "
            f"{result['generating_seconds']:.1f} s ({result['seconds']:.1f} s with everything), "
            f"{result['output_tokens_per_s']:,.0f} output tokens/s, {result['of_one']:.2f} times "
            "one engine's"
        )
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
