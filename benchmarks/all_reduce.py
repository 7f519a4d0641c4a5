"""What an all-reduce of a decode step costs on this machine's GPUs, and whether it can be trusted.

    python -m benchmarks.all_reduce --out all_reduce.json
    python -m benchmarks.all_reduce --stages times --ranks 2

Three stages, each in a process of its own that is ended if it takes too long:

times     us per all-reduce of [B, D] bfloat16 in a chain inside one program (small product,
          all-reduce, residual sum, norm), less the same chain without it
stress    benchmarks.all_reduce_stress: 10^6 all-reduces with pauses, each compared on the devices
withheld  a rank that does not take part: the others give up, and a new workspace works
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from benchmarks import all_reduce_stress, children, machine
from pallas_kernels import add_norm, all_reduce, all_reduce_add_norm
from pallas_kernels.all_reduce import workspace
from pallas_kernels.all_reduce.probe import Chain

AXIS = all_reduce_stress.AXIS
ROWS, SIZES = (1, 8, 64, 256, 512), (4096, 8192)
INNER = 256
"""Of the small product, [B, INNER] x [INNER, D]."""
LAYERS, LOOPS, ROUNDS, RUNS = 16, 16, 9, 3
LEAST_TWO_SHOT = 64
"""Rows: with fewer, nobody would take the two-shot kernel."""
KINDS = {
    "none": "no all-reduce",
    "psum": "psum (NCCL)",
    "peer": "over peer memory",
    "two_shot": "over peer memory, two steps",
    "fused": "over peer memory, with sum and norm",
}
SECONDS = {"times": 150, "stress": 110, "withheld": 40}
"""A stage has at most."""


def on_gpu() -> bool:
    """Asked in a stage's process only: JAX takes the GPUs' memory when it is."""
    return jax.default_backend() == "gpu"


def layer(kind: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(residual, z, kernel, norm, comm) -> (residual, z) of one layer of a chain."""
    forms = {"psum": "xla", "peer": "mosaic_one_shot", "two_shot": "mosaic_two_shot"}

    def run(residual, z, kernel, norm, comm):
        y = z[:, :INNER] @ kernel
        if kind == "fused":
            return all_reduce_add_norm(y, residual, norm, comm, eps=1e-5, axis_name=AXIS)
        if kind != "none":
            y = all_reduce(y, comm, axis_name=AXIS, implementation=forms[kind])
        return add_norm(residual, y, norm, eps=1e-5)

    return run


def chain(mesh: Mesh | AbstractMesh, kind: str, layers: int, loops: int) -> Callable[..., Any]:
    """(residual, z [B, D], kernels [n, INNER, D], norm [D], comm) -> residual, z."""
    step = layer(kind)

    def local(residual, z, kernel, norm, comm):
        def block(_, carry):
            for _ in range(layers):
                carry = step(*carry, kernel[0], norm, comm)
            return carry

        return lax.fori_loop(0, loops, block, (residual, z))

    by_device, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, whole, by_device, whole, by_device),
        out_specs=(whole, whole),
        check_vma=False,
    )


def say(**result: Any) -> None:
    print(json.dumps(result), flush=True)


def mesh_of(ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:ranks]), (AXIS,))


def times(mesh: Mesh, rows: tuple[int, ...], sizes: tuple[int, ...], loops: int) -> None:
    """A line for each shape and kind. CPUs have the XLA form alone."""
    memory = workspace.make(mesh, AXIS) if on_gpu() else None
    whole = NamedSharding(mesh, PartitionSpec())
    by_device = NamedSharding(mesh, PartitionSpec(AXIS))
    none = jax.device_put(np.zeros((mesh.size, workspace.COMM_WORDS), np.int32), by_device)
    comm, quiet = (memory.comm, memory.quiet) if memory else (none, none)
    draw = np.random.default_rng(0)

    def inputs(shape: tuple[int, int]) -> tuple[Any, ...]:
        size = shape[1]
        kernels = (draw.standard_normal((mesh.size, INNER, size)) * 0.05).astype(jnp.bfloat16)
        x = draw.standard_normal(shape).astype(jnp.bfloat16)
        norm = (1 + 0.1 * draw.standard_normal(size)).astype(jnp.bfloat16)
        put = jax.device_put
        return put(x, whole), put(x, whole), put(kernels, by_device), put(norm, whole)

    shapes = [(b, d) for d in sizes for b in rows]
    arrays = {shape: inputs(shape) for shape in shapes}

    def compiled(case: tuple[tuple[int, int], str]) -> Callable[..., Any] | None:
        """None for what an implementation refuses."""
        shape, kind = case
        function = jax.jit(chain(mesh, kind, LAYERS, loops))
        try:
            program = function.lower(*arrays[shape], comm).compile()
        except NotImplementedError:
            return None
        return functools.partial(program, *arrays[shape])

    cases = [
        (shape, kind)
        for shape in shapes
        for kind in (KINDS if memory else ("none", "psum"))
        if kind != "two_shot" or shape[0] >= LEAST_TWO_SHOT
    ]
    with ThreadPoolExecutor(6) as pool:  # all of them, before any is timed
        programs = list(pool.map(compiled, cases))
    base = 0.0
    for (shape, kind), program in zip(cases, programs, strict=True):
        if program is None:
            continue
        jax.block_until_ready(program(quiet))
        us = layer_us(functools.partial(program, comm), loops)
        base = us if kind == "none" else base
        result = {"us_layer": round(us, 2), "us": round(us - base, 2)}
        say(stage="times", kind=kind, shape=shape, **result)
    say(stage="times", missing=memory.missing() if memory else [])


def layer_us(run: Callable[[], Any], loops: int) -> float:
    """Of a layer, microseconds."""
    jax.block_until_ready(run())
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(RUNS):
            last = run()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - started) / (RUNS * LAYERS * loops) * 1e6)
    return statistics.median(found)


def withheld(mesh: Mesh) -> None:
    """One rank's kernels return at once, as if its program had not been launched."""
    memory = workspace.make(mesh, AXIS)
    run = Chain(mesh, AXIS, ("mosaic_one_shot", "mosaic_two_shot"), 4096, jnp.bfloat16, 64)
    run.run(memory.quiet)
    before = run.run(memory.comm)
    started = time.perf_counter()
    run.run(memory.missing_but(mesh.size - 1))
    seconds, missing = time.perf_counter() - started, memory.missing()
    afresh = workspace.make(mesh, AXIS)
    say(
        stage="withheld",
        seconds=round(seconds, 2),
        missing=missing,
        wrong_before=before,
        wrong_afresh=run.run(afresh.comm),
        missing_afresh=afresh.missing(),
    )


def in_process(stage: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a stage printed, in a process of its own. NCCL leaves multicast alone, and XLA takes the
    same product everywhere."""
    command = [sys.executable, "-m", "benchmarks.all_reduce", "--run", stage]
    for name in ("ranks", "stress", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    environment = {"NCCL_NVLS_ENABLE": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
    child = children.run(command, SECONDS[stage], {**os.environ, **environment, "XLA_FLAGS": flags})
    for line in child.lines:
        print(line, flush=True)
    if child.failed:
        print(child.errors[-2000:], flush=True)
        return [*child.lines, {"stage": stage, "failed": child.failed}]
    return child.lines


def table(found: list[dict[str, Any]]) -> str:
    """The results, short."""
    us = {(x["kind"], *x["shape"]): x["us"] for x in found if "us" in x}
    layers = {tuple(x["shape"]): x["us_layer"] for x in found if x.get("kind") == "none"}
    heads = "".join(f"{f'{b}x{d}':>10}" for b, d in layers)
    lines = [f"{'us per all-reduce over the layer without':42}{heads}"]
    for kind, name in KINDS.items():
        cells = [us.get((kind, *shape), "") for shape in layers]
        if kind == "none":
            name, cells = "us of that layer (product, sum, norm)", list(layers.values())
        lines.append(f"{name:42}" + "".join(f"{cell:>10}" for cell in cells))
    lines += [json.dumps(x) for x in found if "us" not in x]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="*", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--ranks", type=int, default=2, help="GPUs")
    parser.add_argument("--stress", type=int, default=1_000_000, help="all-reduces of the stress")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", choices=SECONDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run == "times":
        if on_gpu():
            times(mesh_of(args.ranks), ROWS, SIZES, LOOPS)
        else:
            times(mesh_of(args.ranks), (1,), (INNER,), 1)
    elif args.run == "stress":
        mesh = mesh_of(args.ranks)
        memory = workspace.make(mesh, AXIS) if on_gpu() else None
        seconds = SECONDS["stress"] - 10
        say(stage="stress", **all_reduce_stress.run(mesh, memory, args.stress, args.seed, seconds))
    elif args.run == "withheld":
        withheld(mesh_of(args.ranks))
    else:
        found = [line for stage in args.stages for line in in_process(stage, args)]
        print(f"\n{table(found)}")
        if args.out:
            result = {**machine.describe(), "benchmark": "all_reduce", "ranks": args.ranks}
            args.out.write_text(json.dumps({**result, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
