"""From a loaded model and a mesh [data, tensor] to what runs requests on it."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jaxserve.compat import Settings
from jaxserve.loop import EngineLoop
from jaxserve.parallel.mesh import moved
from jaxserve.parallel.mesh import replicas as rows_of
from jaxserve.replicas.replica import Replica
from jaxserve.replicas.replicas import Replicas
from jaxserve.replicas.router import Router
from jaxserve.step.shared import Shared

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from converters import LoadedModel
    from jaxserve.config.media import Pictures
    from jaxserve.core import Core
    from jaxserve.server_args import ServerArgs


def start_on(
    args: ServerArgs, loaded: LoadedModel, mesh: Mesh, pictures: Pictures | None = None
) -> Core:
    """One loop, or one for each row of `mesh`. loaded: with parameters on its first row. pictures:
    that prompts may show; None: none.

    Everything is read and compiled once: the parameters go from device to device, the first replica
    compiles (or loads) its programs, the others load them, all at the same time.
    """
    rows = rows_of(mesh)
    if len(rows) == 1:
        return EngineLoop.start(args, loaded, rows[0], pictures)
    started = time.perf_counter()
    models = [loaded, *(_moved(loaded, row) for row in rows[1:])]
    shared = Shared(list(mesh.devices.flat))
    replicas = [Replica(rank, list(row.devices.flat)) for rank, row in enumerate(rows)]
    first = EngineLoop.start(args, loaded, rows[0], pictures, shared, replicas[0])
    replicas[0].run_by(first)
    settings = Settings.here()

    def start(rank: int) -> None:
        with settings.applied():
            loop = EngineLoop.beside(first, models[rank], rows[rank], shared, replicas[rank])
        replicas[rank].run_by(loop)

    try:
        with ThreadPoolExecutor(len(rows) - 1, "jaxserve-start") as threads:
            for _ in threads.map(start, range(1, len(rows))):
                pass
    except BaseException:
        for replica in replicas:
            replica.give_up()
        raise
    router = Router(
        args.load_balance_method,
        first.config.program.page_size,
        first.most_cached_tokens,
        len(replicas),
    )
    return Replicas(router, replicas, time.perf_counter() - started)


def _moved(loaded: LoadedModel, row: Mesh) -> LoadedModel:
    """A copy on another row of the mesh."""
    tower = loaded.tower
    if tower is not None:
        tower = dataclasses.replace(tower, params=moved(tower.params, row))
    return dataclasses.replace(loaded, params=moved(loaded.params, row), tower=tower)
