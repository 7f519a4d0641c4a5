"""Ray Datasets as input, Parquet in and out, and what goes wrong within actors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow.dataset
import ray

import jaxserve.batch
from jaxserve import EngineDeadError, InvalidRequestError, ModelLoadError
from jaxserve.batch import on_ray
from jaxserve.batch.job import Job
from tests.batch_engine import EchoEngine
from tests.batch_on_ray.common import output, prompt


class Echoes(on_ray.EngineActor):
    """Answers with what it is asked."""

    def __init__(self, job: Job) -> None:
        self._job, self._engine = job, Deadly(job.server_args)


class Deadly(EchoEngine):
    def generate(self, prompt=None, sampling_params=None, input_ids=None):
        if "kill" in prompt:
            os._exit(1)
        if "full" in prompt:
            raise OSError(28, "No space left on device")
        return super().generate(prompt, sampling_params, input_ids)


RUN = {"model_path": "model", "runner": "ray", "part_rows": 4, "progress": False, "dp_size": 1}


def raised(error: type[Exception], rows: list, out: str, **more: object) -> str:
    try:
        jaxserve.batch.run(rows, out, **(RUN | more))
    except error as found:
        print(f"{type(found).__name__}: {found}")
        return str(found)
    raise AssertionError(f"no {error.__name__} was raised")


def main(scratch: str) -> int:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    missing = f"{scratch}/nowhere"
    rows = [{"prompt": prompt(number), "id": number} for number in range(30)]
    said = raised(ModelLoadError, rows, f"{scratch}/model", model_path=missing)
    assert missing in said

    on_ray.EngineActor = Echoes
    out = f"{scratch}/dataset"
    dataset = ray.data.from_items(rows, override_num_blocks=3)
    report = jaxserve.batch.run(dataset, out, **RUN)
    assert report.total.rows == 30
    assert sorted(row["id"] for row in output(out)) == list(range(30))
    assert all(row["text"].startswith(prompt(row["id"])) for row in output(out))
    os.remove(Path(out) / "part-000002.jsonl")
    again = jaxserve.batch.run(dataset, out, **RUN)
    assert again.now.rows in (2, 3, 4)
    assert sorted(row["id"] for row in output(out)) == list(range(30))
    other = ray.data.from_items([{"prompt": "a"}])
    assert "belongs to another job" in raised(InvalidRequestError, other, out)

    parquet = f"{scratch}/parquet"
    dataset.write_parquet(parquet)
    jaxserve.batch.run(parquet, f"{scratch}/out", output_format="parquet", **RUN)
    table = pyarrow.dataset.dataset(f"{scratch}/out").to_table()
    assert sorted(table["id"].to_pylist()) == list(range(30))
    assert ray.data.read_parquet(f"{scratch}/out").count() == 30  # _job is passed over

    with_full = [*rows[:6], {"prompt": "full"}, *rows[6:]]
    assert "No space left" in raised(OSError, with_full, f"{scratch}/full")
    with_killer = [*rows[:6], {"prompt": "kill"}, *rows[6:]]
    said = raised(EngineDeadError, with_killer, f"{scratch}/kill", parts_in_flight=1)
    assert "part 1 (4 rows from row 4)" in said and "6 times" in said
    ray.shutdown()
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
