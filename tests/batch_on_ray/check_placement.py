"""Which GPUs the actors get: declared resources, no GPU, no engine."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
import uuid
from pathlib import Path

import ray

import jaxserve.batch
from jaxserve import InvalidRequestError
from jaxserve.batch import on_ray
from jaxserve.batch.job import Job
from tests.batch_engine import EchoEngine
from tests.batch_on_ray.common import cluster, output, prompt


class Placed(on_ray.EngineActor):
    """Writes down where it is."""

    def __init__(self, job: Job) -> None:
        self._job, self._engine = job, EchoEngine(job.server_args)
        where = {
            "node": ray.get_runtime_context().get_node_id(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "ray": sorted(map(str, ray.get_gpu_ids())),
        }
        (job.folder.own / f"placed-{uuid.uuid4().hex}").write_text(json.dumps(where))


class Pair(Placed):
    """Of a tensor-parallel engine of two GPUs."""


def placed(out: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in Path(out, "_job").glob("placed-*")]


def check(found: list[dict], actors: int, each: int) -> None:
    print(json.dumps(found, indent=1))
    assert len(found) == actors
    assert all(len(where["gpus"].split(",")) == each for where in found)
    assert all(sorted(where["gpus"].split(",")) == where["ray"] for where in found)
    taken = [(where["node"], gpu) for where in found for gpu in where["ray"]]
    assert len(set(taken)) == actors * each, "two actors have the same GPU"


def main(scratch: str) -> int:
    nodes = cluster(scratch, 2, num_cpus=2, num_gpus=2)
    ray.init(nodes.address, log_to_driver=False)
    rows = [{"prompt": prompt(number)} for number in range(200)]
    on_ray.EngineActor = Placed
    out = f"{scratch}/one"
    run = {"model_path": "model", "runner": "ray", "part_rows": 2, "progress": False}
    report = jaxserve.batch.run(rows, out, **run)
    assert report.runner == "ray" and [row["index"] for row in output(out)] == list(range(200))
    check(placed(out), actors=4, each=1)

    out = f"{scratch}/two"
    jaxserve.batch.run(rows, out, dp_size=2, **run)
    check(placed(out), actors=2, each=1)

    # More engines than there is room for: those that find none wait, the others work.
    out = f"{scratch}/many"
    jaxserve.batch.run(rows, out, dp_size=6, **run)
    check(placed(out), actors=4, each=1)

    # Engines that are two GPUs each.
    out = f"{scratch}/pairs"
    kept: list[Job] = []
    cluster_of = on_ray.cluster

    def with_two(job: Job, *more: object) -> object:
        args = types.SimpleNamespace(tp_size=2, device=None)
        kept.append(dataclasses.replace(job, server_args=args))  # pyright: ignore
        return cluster_of(kept[0], *more)  # pyright: ignore

    on_ray.cluster = with_two  # pyright: ignore
    jaxserve.batch.run(rows, out, **run)
    check(placed(out), actors=2, each=2)
    kept.clear()

    try:
        jaxserve.batch.run(rows, f"{scratch}/large", cpus_per_engine=3, **run)
    except InvalidRequestError as error:
        print(error)
        assert "no machine of the Ray cluster has room for an engine of tp_size=2" in str(error)
        assert "2 GPUs, 2 CPUs, 2 GPUs, 2 CPUs" in str(error)
    else:
        raise AssertionError("an engine without room was not refused")
    ray.shutdown()
    nodes.shutdown()
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
