"""all_reduce on this machine's devices, in a process of its own: python -m tests.kernels.on_mesh

Every implementation that they can run, over 2, 4 and 8 of them, against the reference. The last
line is JSON: how many cases were right, by implementation and number of ranks.
"""

from __future__ import annotations

import collections
import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels.all_reduce import workspace
from pallas_kernels.all_reduce.cases import EDGES, LARGE, Case
from pallas_kernels.all_reduce.reference import all_reduce, all_reduce_add_norm
from tests.kernels.support import assert_close

ON_GPU = jax.default_backend() == "gpu"
WHOLE, PARTS = PartitionSpec(), PartitionSpec("tensor")
RUNS = 5
"""More than there are buffers."""


def program(mesh: Mesh, name: str, eps: float) -> Any:
    """(parts [n, B, D], residual, norm, comm) -> sums, totals and normed of every rank [n, B, D].
    Both operations, the second on what the first gives, so that they depend on each other."""

    def local(x, residual, norm, comm):
        comm = comm if name != "xla" else None
        summed = pallas_kernels.all_reduce(x[0], comm, implementation=name)
        x = x[0] + 0 * summed
        total, normed = pallas_kernels.all_reduce_add_norm(
            x, residual, norm, comm, eps=eps, implementation=name
        )
        return summed[None], total[None], normed[None]

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PARTS, WHOLE, WHOLE, PARTS),
            out_specs=(PARTS,) * 3,
            check_vma=False,
        )
    )


def check(mesh: Mesh, name: str, case: Case, dtype: str, comms: tuple[Any, Any], seed: int) -> None:
    """comms: quiet, and that of real runs."""
    run = program(mesh, name, case.eps)
    for turn in range(-1, RUNS):
        make = case.integers if turn % 2 else case.inputs
        parts, residual, norm = make(seed + turn + 1, mesh.size, dtype)
        arrays = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in ((parts, PARTS), (residual, WHOLE), (norm, WHOLE))
        ]
        results = jax.block_until_ready(run(*arrays, comms[turn >= 0]))
        if turn < 0 and name != "xla":
            continue  # of a quiet run the results are anything
        rounded = name != "mosaic_one_shot"
        wanted = (
            all_reduce(parts),
            *all_reduce_add_norm(parts, residual, norm, eps=case.eps, rounded=rounded),
        )
        for got, want in zip(results, wanted, strict=True):
            got = np.asarray(got)
            assert got.dtype == parts.dtype
            assert (got == got[0]).all(), "ranks differ"
            assert_close(got[0], want, dtype)
        if turn % 2:  # integers: exact whatever the order
            for got, want in zip(results[:2], wanted[:2], strict=True):
                np.testing.assert_array_equal(np.asarray(got)[0].astype(np.float32), want)


def main() -> None:
    done: collections.Counter[str] = collections.Counter()
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    names = pallas_kernels.available_implementations("all_reduce", np.float16)
    for ranks in (n for n in (2, 4, 8) if n <= len(jax.devices())):
        mesh = Mesh(np.array(jax.devices()[:ranks]), ("tensor",))
        rows = np.zeros((ranks, workspace.COMM_WORDS), np.int32)
        comms = (jax.device_put(rows, NamedSharding(mesh, PARTS)),) * 2
        work = workspace.make(mesh, "tensor") if ON_GPU else None
        if work is not None:
            comms = work.quiet, work.comm
        for case in (*EDGES, *LARGE) if ON_GPU else EDGES:
            other = "float16" if ON_GPU else "float32"
            both = case in EDGES and (ON_GPU or ranks == 8)
            for dtype in ("bfloat16", other) if both else ("bfloat16",):
                for name in names:
                    try:
                        check(mesh, name, case, dtype, comms, seed)
                    except NotImplementedError:
                        continue
                    except AssertionError as error:
                        raise AssertionError(f"{name}, {ranks} ranks, {case}, {dtype}") from error
                    done[f"{name} {ranks}"] += 1
        assert work is None or work.missing() == [0] * ranks, work.missing()
    print(json.dumps(done))


if __name__ == "__main__":
    main()
