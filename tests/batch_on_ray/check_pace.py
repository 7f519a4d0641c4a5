"""Two actors of a Ray job beside two plain processes with an engine each: the same rows, the same
cores, everything started and compiled beforehand. The wall may be 1.05 times as long.

`--repeat N` measures N times, in turn, and compares the medians. Ray's own processes (the driver,
its actors for statistics and scaling) want cores beside the two; the CPU seconds of the engines'
processes tell what is theirs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray
import ray.data

from jaxserve.batch import on_ray, run
from jaxserve.batch.job import Job
from tests.batch_on_ray.common import OPTIONS, STORE, model, output, prompt

ROWS = 5000
MOST = 1.05
SAMPLING = {"temperature": 0.0, "max_new_tokens": 240, "ignore_eos": True}
ENGINE: dict[str, Any] = {**OPTIONS, "precompile": True, "disable_radix_cache": True}
WARM = [prompt(number) for number in range(200)]


class Pinned(on_ray.EngineActor):
    """On a core of its own, with everything compiled."""

    def __init__(self, job: Job) -> None:
        os.sched_setaffinity(0, {core(int(os.environ["CUDA_VISIBLE_DEVICES"]))})
        super().__init__(job)
        self._engine.generate(WARM, SAMPLING)  # pyright: ignore
        self._ready, self._spent = time.time(), time.process_time()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        done = super().__call__(batch)
        told = {"ready": self._ready, "cpu": time.process_time() - self._spent}
        (self._job.folder.own / f"engine-{os.getpid()}").write_text(json.dumps(told))
        return done


def core(number: int) -> int:
    """Two cores of those that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[number % len(cores)]


def plain(folder: str, rows: list[str], target: str, number: int, pipe: Connection) -> None:
    """A process: an engine, one call, one file."""
    os.sched_setaffinity(0, {core(number)})
    from jaxserve import Engine

    with Engine(folder, **ENGINE) as engine:
        engine.generate(WARM, SAMPLING)
        pipe.send("ready")
        pipe.recv()
        spent = time.process_time()
        with open(target, "w") as file:
            for result in engine.generate(rows, SAMPLING):
                file.write(json.dumps({"text": result["text"], **result["meta_info"]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        pipe.send(time.process_time() - spent)


def plain_seconds(folder: str, scratch: str, number: int) -> tuple[float, float]:
    """Of the wall, and of the CPUs."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for half in range(2):
        ours, theirs = context.Pipe()
        rows = [prompt(row) for row in range(half, ROWS, 2)]
        target = f"{scratch}/plain-{number}-{half}.jsonl"
        process = context.Process(target=plain, args=(folder, rows, target, half, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    assert [pipe.recv() for pipe in pipes] == ["ready"] * 2
    began = time.time()
    for pipe in pipes:
        pipe.send("go")
    spent = sum(pipe.recv() for pipe in pipes)
    seconds = time.time() - began
    for process in processes:
        process.join()
    return seconds, spent


def ray_seconds(folder: str, scratch: str, number: int) -> tuple[float, float]:
    """As `plain_seconds`, from the moment that both engines are ready until the driver knows that
    every part is done."""
    ray.init(
        num_cpus=2,
        num_gpus=2,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
    )
    context = ray.data.DataContext.get_current()
    context.wait_for_min_actors_s = 600  # no row before both engines are there
    out = f"{scratch}/ray-{number}"
    path = Path(scratch) / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt(row)}) + "\n" for row in range(ROWS)))
    ended = []
    cluster = on_ray.cluster

    def timed(*arguments: Any) -> Any:
        yield from cluster(*arguments)
        ended.append(time.time())

    on_ray.cluster = timed
    try:
        report = run(
            path,
            out,
            folder,
            runner="ray",
            sampling_params=SAMPLING,
            progress=False,
            **ENGINE,
        )
    finally:
        on_ray.cluster = cluster
        ray.shutdown()
    assert report.total.rows == len(output(out)) == ROWS and not report.total.failed
    assert report.total.completion_tokens == ROWS * SAMPLING["max_new_tokens"]
    engines = [json.loads(file.read_text()) for file in Path(out, "_job").glob("engine-*")]
    assert len(engines) == 2
    ready = max(engine["ready"] for engine in engines)
    return ended[0] - ready, sum(engine["cpu"] for engine in engines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    folder = model(given.scratch)
    on_ray.EngineActor = Pinned
    walls: dict[str, list[float]] = {"plain": [], "ray": []}
    spent: dict[str, list[float]] = {"plain": [], "ray": []}
    for number in range(given.repeat):
        for name, measure in (("plain", plain_seconds), ("ray", ray_seconds)):
            wall, cpu = measure(folder, given.scratch, number)
            walls[name].append(wall)
            spent[name].append(cpu)
            print(f"{name}: {wall:.2f} s, {cpu:.2f} CPU seconds of engines", flush=True)
    ratio = statistics.median(walls["ray"]) / statistics.median(walls["plain"])
    of_cpu = statistics.median(spent["ray"]) / statistics.median(spent["plain"])
    print(
        f"{ROWS} rows, medians of {given.repeat}: ratio {ratio:.3f} (at most {MOST}), "
        f"of the engines' CPU seconds {of_cpu:.3f}, {os.cpu_count()} cores"
    )
    return ratio > MOST


if __name__ == "__main__":
    sys.exit(main())
