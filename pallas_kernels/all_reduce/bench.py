"""What to time of all_reduce, over all devices: the XLA form.

The peer kernels need a first run with `Workspace.quiet`, which `benchmarks.all_reduce` gives them;
there they stand beside this form.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.benchmark import Problem

MODELS = {"llama-8b": 4096, "qwen-0.5b": 896}
ROWS = (1, 64, 256, 8192)
AXIS = "tensor"


def problem(size: int, rows: int, *, name: str, calls: int, dtype: Any) -> Problem:
    """A call's total is the next one's residual, as in a model."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    whole, parts = PartitionSpec(), PartitionSpec(AXIS)

    def build(key: jax.Array) -> Any:
        keys = jax.random.split(key, calls + 1)
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, whole))
        residual = put(jax.random.normal(keys[0], (rows, size), dtype))
        normed = [put(jnp.zeros((rows, size), dtype)) for _ in range(calls)]
        shape = (mesh.size * rows, size)
        xs = [
            jax.device_put(jax.random.normal(k, shape, dtype), NamedSharding(mesh, parts))
            for k in keys[1:]
        ]
        return (residual, normed), (put(jnp.ones((size,), dtype)),), xs

    def step(run, carry, fixed, x):
        residual, normed = carry  # every result is kept, or XLA would drop what makes it
        residual, latest = jax.shard_map(
            lambda x, *others: run(x, None, *others, eps=1e-6, axis_name=AXIS),
            mesh=mesh,
            in_specs=(parts, whole, whole),
            out_specs=(whole, whole),
            check_vma=False,
        )(x, residual, *fixed)
        return residual, [*normed[1:], latest]

    return Problem(
        name=name,
        features={"tokens": rows, "size": size, "ranks": mesh.size},
        bytes=4.0 * rows * size * jnp.dtype(dtype).itemsize,
        flops=0.0,
        calls=calls,
        build=build,
        step=step,
    )


def problems() -> list[Problem]:
    """Real shapes, bfloat16; nothing on one device."""
    if len(jax.devices()) == 1:
        return []
    return [
        problem(size, rows, name=f"{model} B={rows}", calls=32, dtype=jnp.bfloat16)
        for model, size in MODELS.items()
        for rows in ROWS
    ]


def smoke() -> list[Problem]:
    return [problem(96, 4, name="tiny", calls=2, dtype=jnp.float32)]


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Nothing has sizes that were worth choosing."""
    del implementation, features
    return []
