"""5,000 rows, 1% of them broken, on two Ray nodes; actors and the driver are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray  # makes Ray's own psutil importable
import transformers

from tests.batch_on_ray.common import OPTIONS, SAMPLING, cluster, model, output, prompt, wait_for

import psutil  # isort: skip

ROWS = 5000
BROKEN = {0: '{"prompt": ', 1: '{"prompt": ""}', 2: '{"prompt": "x", "top_p": 7}', 3: '{"id": 1}'}


def is_broken(number: int) -> bool:
    return number % 100 == 37


def line(number: int) -> str:
    if is_broken(number):
        return BROKEN[number // 100 % len(BROKEN)]
    return json.dumps({"id": f"row {number}", "prompt": prompt(number)})


def actors() -> list[psutil.Process]:
    """The processes of engines, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def main(scratch: str) -> int:
    path, out = Path(scratch) / "in.jsonl", Path(scratch) / "out"
    path.write_text("".join(line(number) + "\n" for number in range(ROWS)))
    folder = model(scratch)
    nodes = cluster(scratch, 2, num_cpus=1, num_gpus=1)
    command = [
        *(sys.executable, "-m", "jaxserve.batch", "--runner", "ray", "--model", folder),
        *("--input", str(path), "--output", str(out), "--sampling-params", json.dumps(SAMPLING)),
        *("--part-rows", "32", "--no-progress", "--cost-per-hour", "1"),
        *(
            x
            for name, value in OPTIONS.items()
            for x in (f"--{name.replace('_', '-')}", str(value))
        ),
    ]
    environment = os.environ | {"RAY_ADDRESS": nodes.address}

    def parts() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in out.glob("part-*")}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    began = time.monotonic()
    job = start()
    for done, name in ((10, "first"), (40, "second")):
        wait_for(lambda done=done: len(parts()) >= done or job.poll() is not None, f"{done} parts")
        [victim, *_] = actors()
        victim.send_signal(signal.SIGKILL)
        print(f"{time.monotonic() - began:.1f} s, {len(parts())} parts: {name} actor killed")
    wait_for(lambda: len(parts()) >= 80 or job.poll() is not None, "80 parts")
    assert job.poll() is None, "the job ended before its driver was killed"
    job.kill()
    job.wait()
    wait_for(lambda: not actors(), "the end of the actors of a driver that was killed")
    there = parts()
    print(f"{time.monotonic() - began:.1f} s, {len(there)} parts: driver killed, actors gone")
    assert len(there) < ROWS / 32

    again = start()
    printed, _ = again.communicate(timeout=600)
    print(f"{time.monotonic() - began:.1f} s: {printed}")
    assert again.returncode == 0
    assert there.items() <= parts().items(), "a finished part was written again"
    check(output(out), folder)

    finished, began = parts(), time.monotonic()
    last = start()
    printed, _ = last.communicate(timeout=600)
    assert last.returncode == 0 and "nothing was left to do" in printed
    assert parts() == finished
    print(f"the third run did nothing, in {time.monotonic() - began:.1f} s")
    nodes.shutdown()
    return 0


def check(rows: list[dict], folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [row["index"] for row in rows] == list(range(ROWS)), "rows are missing or twice there"
    for row in rows:
        number = row["index"]
        if is_broken(number):
            assert row["error"] and row["text"] is None, row
        else:
            assert row["error"] is None and row["id"] == f"row {number}", row
            assert row["prompt_tokens"] == len(tokenizer(prompt(number))["input_ids"]), row
            assert 1 <= row["completion_tokens"] <= SAMPLING["max_new_tokens"], row
    good = sum(row["error"] is None for row in rows)
    print(f"ray {ray.__version__}: {len(rows)} rows, {good} good ones answered once each")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
