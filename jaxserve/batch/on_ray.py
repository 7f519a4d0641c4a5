"""A job on a Ray cluster: parts are rows of a Ray Dataset, engines are the actors of its map.

Ray Data starts the actors where the GPUs are, gives each as many parts as it answers at a time,
starts those that die again, and gives their parts to whoever is there. Doing a part twice writes
the same file, so that each row is in the output once, whatever Ray repeats.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.batch.answers import ENGINE_IS_GONE
from jaxserve.batch.job import GONE, Job, portable
from jaxserve.batch.tally import Tally
from jaxserve.errors import EngineDeadError, InvalidRequestError, NotSupportedError

if TYPE_CHECKING:
    from jaxserve.engine import Engine

MOST_TIMES = 6
"""That a run begins a part. Ray repeats what an actor did that died, as often as it dies."""


def installed() -> bool:
    """Whether there is a Ray to import."""
    return importlib.util.find_spec("ray") is not None


def check_installed() -> None:
    """Raises NotSupportedError without Ray."""
    if not installed():
        raise NotSupportedError("runner='ray' needs Ray: pip install jaxserve[ray]")


class EngineActor:
    """An engine in an actor of Ray's."""

    def __init__(self, job: Job) -> None:
        from jaxserve.engine import Engine

        self._job = job
        self._engine: Engine | Exception
        try:
            self._engine = Engine(server_args=job.server_args)
        except Exception as error:  # Ray would show where it was raised, and not what
            self._engine = error

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Does one part, {"part": [number]}; returns its tally, or why there is none, pickled."""
        try:
            result = self._do(int(batch["part"][0]))
        except ENGINE_IS_GONE:
            os._exit(GONE)  # an actor that died is started again, with another engine
        except Exception as error:
            result = portable(error)
        return {"result": [pickle.dumps(result)]}

    def _do(self, number: int) -> Tally | Exception:
        if isinstance(self._engine, Exception):
            return portable(self._engine)
        times = self._job.folder.begin(number)
        if times > MOST_TIMES:
            return EngineDeadError(
                f"part {number} ({self._job.parts[number].rows} rows from row "
                f"{self._job.parts[number].index}) was begun {MOST_TIMES} times, and each time the "
                "actor that did it died"
            )
        return self._job.do(self._engine, number)


def cluster(job: Job, numbers: Sequence[int], engines: int | None, cpus: float) -> Iterator[Tally]:
    """Does the parts on the cluster that `ray.init` or RAY_ADDRESS names, or on a Ray of this
    machine's own. engines: None is as many as fit: by the GPUs, and where there are none one a
    machine. cpus: of each. Raises InvalidRequestError where none fits."""
    import ray  # pyright: ignore[reportMissingImports]

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    try:
        yield from _map(job, numbers, engines, cpus)
    finally:
        if ours:
            ray.shutdown()


def _map(job: Job, numbers: Sequence[int], engines: int | None, cpus: float) -> Iterator[Tally]:
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = job.server_args.device != "cpu" and any(node.get("GPU") for node in nodes)
    gpus = job.server_args.tp_size if with_gpus else 0
    fitting = sum(_room(node, gpus, cpus) for node in nodes)
    if not fitting:
        raise InvalidRequestError(
            f"no machine of the Ray cluster has room for an engine of tp_size={gpus or 1} and "
            f"cpus_per_engine={cpus:g}: they have "
            + ", ".join(
                f"{node.get('GPU', 0):g} GPUs, {node.get('CPU', 0):g} CPUs" for node in nodes
            )
        )
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    parts = ray.data.from_items(
        [{"part": number} for number in numbers], override_num_blocks=len(numbers)
    )
    tallies = parts.map_batches(
        EngineActor,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(engines or fitting, len(numbers)),
            max_concurrent_calls_per_actor=job.parts_in_flight,
            enable_true_multi_threading=True,
        ),
        num_gpus=gpus or None,
        num_cpus=cpus,
    )
    context.enable_progress_bars = shown  # the dataset keeps a copy
    for row in tallies.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, Exception):
            raise result
        yield result


def _room(node: Mapping[str, float], gpus: int, cpus: float) -> int:
    """How many engines a machine has room for."""
    by_cpus = int(node.get("CPU", 0) // cpus) if cpus else None
    if gpus:
        by_gpus = int(node.get("GPU", 0) // gpus)
        return by_gpus if by_cpus is None else min(by_gpus, by_cpus)
    return 1 if by_cpus is None else min(1, by_cpus)
