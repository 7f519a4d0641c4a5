"""Do the peer kernels give the right sums on these devices, and sooner than XLA's collective?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.all_reduce.api import all_reduce
from pallas_kernels.all_reduce.workspace import Workspace

ROWS = 8
CALLS = 3
"""Of the check, each kernel: as many as there are buffers."""
TIMED_CALLS, REPEATS = 64, 5


@dataclasses.dataclass(frozen=True)
class Probe:
    """wrong: numbers that were not the exact sum, of all devices and calls. peer_us, xla_us: a call
    for 8 rows, microseconds, best of a few; the sum that a call waits for is in it, and a share of
    the program's launch."""

    wrong: int
    peer_us: float
    xla_us: float


def probe(mesh: Mesh, axis_name: str, work: Workspace, size: int, dtype: Any) -> Probe:
    """Run both kernels and XLA's form on [8, size] over the devices of `mesh`. Compiles three
    programs; ends in bounded time, since the kernels do."""
    forms = ("mosaic_one_shot", "mosaic_two_shot")
    check = Chain(mesh, axis_name, forms, size, dtype, CALLS)
    check.run(work.quiet)
    wrong = check.run(work.comm)
    times = []
    for form in ("mosaic_one_shot", "xla"):
        chain = Chain(mesh, axis_name, (form,), size, dtype, TIMED_CALLS, every=False)
        chain.run(work.quiet)
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            wrong += chain.run(work.comm)
            seconds.append(time.perf_counter() - started)
        times.append(min(seconds) / TIMED_CALLS * 1e6)
    return Probe(wrong, *times)


class Chain:
    """A chain of all-reduces of small integers. See `chained`."""

    def __init__(
        self,
        mesh: Mesh,
        axis_name: str,
        forms: Sequence[str],
        size: int,
        dtype: Any,
        calls: int,
        every: bool = True,
    ):
        rng = np.random.default_rng(size)
        parts = rng.integers(-9, 10, (mesh.size, ROWS, size))
        self._arrays = (
            jax.device_put(parts.astype(dtype), NamedSharding(mesh, PartitionSpec(axis_name))),
            jax.device_put(parts.sum(0).astype(dtype), NamedSharding(mesh, PartitionSpec())),
        )
        self._program = jax.jit(chained(mesh, axis_name, forms, calls, every))

    def run(self, comm: jax.Array) -> int:
        """Numbers that were wrong."""
        return int(np.asarray(self._program(*self._arrays, comm)).sum())


def chained(
    mesh: Mesh | AbstractMesh, axis_name: str, forms: Sequence[str], calls: int, every: bool = True
) -> Callable[..., jax.Array]:
    """(parts [n, B, D], their exact sum [B, D], comm) -> wrong numbers of each device [n] int32, of
    `calls` calls of each of `forms` in turn. A call depends on the one before, and every second
    one's numbers are twice as large, so that none gives the results of three calls ago. every: all
    results are compared, else the last ones, so that hardly anything but the calls takes time."""

    def local(x: jax.Array, exact: jax.Array, comm: jax.Array) -> jax.Array:
        y, wrong = jnp.zeros_like(x[0]), jnp.zeros((1,), jnp.int32)
        for call in range(calls):
            times = 1 + call % 2
            for form in forms:
                after = jnp.nan_to_num(0 * y)  # a quiet run's are anything
                y = all_reduce(x[0] * times + after, comm, axis_name=axis_name, implementation=form)
                if every or call == calls - 1:
                    wrong += jnp.sum(y != exact * times, dtype=jnp.int32)
        return wrong

    by_device, whole = PartitionSpec(axis_name), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_device, whole, by_device),
        out_specs=by_device,
        check_vma=False,
    )
