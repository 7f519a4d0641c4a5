"""Many all-reduces on GPUs that stop at random: is every one of them exact?

Twelve shapes in random order, one after the other in loops on the devices, of small integers, so
that every order of summing is exact; counted on the devices. Before each turn of a loop a device
may pause, mostly for microseconds, a few times for up to a second.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import all_reduce, all_reduce_add_norm
from pallas_kernels.all_reduce.workspace import Workspace
from pallas_kernels.mosaic_ops import plgpu
from pallas_kernels.ptx import asm, global_address, scope
from pallas_kernels.rms_norm import rms_norm

AXIS = "tensor"
TURNS, ORDERS = 128, 3
"""Turns of a program's loop; programs, each with an order of its own."""
LONG_PAUSES, LONGEST_MS = 10, 1000
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one all-reduce [rows, size]. fused: with residual and norm."""

    rows: int
    size: int
    fused: bool = False


SHAPES = (
    Shape(1, 4096, True),
    Shape(8, 4096),
    Shape(64, 4096, True),
    Shape(256, 4096, True),
    Shape(300, 4096),
    Shape(512, 4096, True),
    Shape(1, 896),
    Shape(33, 896, True),
    Shape(200, 896),
    Shape(5, 2560, True),
    Shape(130, 8192, True),
    Shape(17, 5120),
)
SMALL_SHAPES = (Shape(1, 64, True), Shape(3, 128), Shape(2, 96, True))
"""For CPUs."""


def part(shape: Shape, tick: Any, rank: Any) -> jax.Array:
    """[B, D] int32 from -6 to 6: what `rank` gives to the tick-th sum."""
    row, column = (lax.broadcasted_iota(jnp.int32, (shape.rows, shape.size), i) for i in (0, 1))
    return (column * 7 + row * 3 + tick * (2 * rank + 3) + rank * 5) % 13 - 6


def pause(micros: jax.Array) -> jax.Array:
    """0 [1] int32, that many microseconds later. micros [1] int32."""
    text = scope(
        [
            ".reg .pred more;",
            ".reg .u32 micros;",
            ".reg .u64 start, now, long;",
            "ld.global.u32 micros, [$0];",
            "mul.wide.u32 long, micros, 1000;",
            "mov.u64 start, %globaltimer;",
            "WAIT:",
            "mov.u64 now, %globaltimer;",
            "sub.u64 now, now, start;",
            "setp.lt.u64 more, now, long;",
            "@more bra WAIT;",
            "mov.u32 micros, 0;",
            "st.global.u32 [$1], micros;",
        ]
    )

    def body(micros_ref: Any, out_ref: Any) -> None:
        ref = plgpu.RefType()

        @plgpu.inline_mgpu(arg_types=(ref, ref))
        def wait(ctx: Any, micros_ref: Any, out_ref: Any) -> None:
            del ctx
            asm(text, "l,l", global_address(micros_ref), global_address(out_ref))

        wait(micros_ref, out_ref)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        grid=(1,),
        grid_names=("block",),
    )(micros)


def loop(
    mesh: Mesh | AbstractMesh,
    shapes: Sequence[Shape],
    turns: int,
    *,
    pausing: bool,
) -> Callable[..., jax.Array]:
    """(micros [n, turns], tick, wrong [n], comm) int32 -> wrong, more by the numbers that were, of
    `turns` times the shapes in their order."""
    ranks = mesh.shape[AXIS]

    def call(shape: Shape, tick: jax.Array, seen: jax.Array, comm: jax.Array) -> Any:
        """(wrong numbers, a number of the result) of one sum, which waits for `seen`."""
        mine = part(shape, tick, lax.axis_index(AXIS)).astype(jnp.bfloat16)
        x = mine + jnp.nan_to_num(0 * seen).astype(jnp.bfloat16)
        exact = sum(part(shape, tick, rank) for rank in range(ranks))
        if not shape.fused:
            y = all_reduce(x, comm, axis_name=AXIS)
            return jnp.sum(y != exact.astype(y.dtype), dtype=jnp.int32), y[0, 0]
        residual = part(shape, tick, ranks)
        norm = jnp.ones((shape.size,), x.dtype)
        y, normed = all_reduce_add_norm(
            x, residual.astype(x.dtype), norm, comm, eps=EPS, axis_name=AXIS
        )
        total = (exact + residual).astype(x.dtype)
        near = jnp.abs(normed - rms_norm(total, norm, EPS)) <= 0.02  # of numbers up to 4
        wrong = jnp.sum(y != total, dtype=jnp.int32) + jnp.sum(~near, dtype=jnp.int32)
        return wrong, normed[0, 0] + y[0, 0]

    def local(micros: jax.Array, tick: jax.Array, wrong: jax.Array, comm: jax.Array) -> jax.Array:
        def turn(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            seen, wrong = carry
            if pausing:
                after = jnp.nan_to_num(0 * seen).astype(jnp.int32)
                seen = pause(micros[0, i][None] + after)[0].astype(jnp.bfloat16)
            for number, shape in enumerate(shapes):
                more, seen = call(shape, tick + i * len(shapes) + number, seen, comm)
                wrong += more
            return seen, wrong

        start = jnp.zeros((), jnp.bfloat16), wrong[0]
        return lax.fori_loop(0, turns, turn, start)[1][None]

    by_device, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_device, whole, by_device, by_device),
        out_specs=by_device,
        check_vma=False,
    )


def pauses(rng: np.random.Generator, runs: int, ranks: int, turns: int) -> np.ndarray:
    """[runs, n, turns] int32 microseconds: one in fifty up to 300, a few up to a second."""
    micros = rng.integers(1, 300, (runs, ranks, turns))
    micros *= rng.random(micros.shape) < 0.02
    for _ in range(LONG_PAUSES):
        at = tuple(rng.integers(size) for size in micros.shape)
        micros[at] = rng.integers(1000 * LONGEST_MS // 5, 1000 * LONGEST_MS)
    return micros.astype(np.int32)


def run(
    mesh: Mesh, memory: Workspace | None, count: int, seed: int, seconds: float
) -> dict[str, Any]:
    """`count` all-reduces or a few more, as far as `seconds` allow. memory: None takes XLA's form
    and does without pauses."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    started = time.perf_counter()
    shapes = SHAPES if memory else SMALL_SHAPES
    turns = TURNS if memory else 4
    runs = -(-count // (turns * len(shapes)))
    by_device = NamedSharding(mesh, PartitionSpec(AXIS))
    put = functools.partial(jax.device_put, device=by_device)
    micros = pauses(rng, runs, mesh.size, turns)
    none = np.zeros((mesh.size, 32), np.int32)
    comms = (memory.quiet, memory.comm) if memory else (put(none), put(none))
    wrong = put(np.zeros(mesh.size, np.int32))
    programs = []
    for _ in range(ORDERS):
        order = draw.sample(shapes, len(shapes))
        function = jax.jit(loop(mesh, order, turns, pausing=memory is not None))
        program = function.lower(put(micros[0]), np.int32(0), wrong, comms[0]).compile()
        jax.block_until_ready(program(put(0 * micros[0]), np.int32(0), wrong, comms[0]))
        programs.append(program)
    compiled = time.perf_counter()
    done = 0
    missing = [0] * mesh.size
    for number in range(runs):
        tick = np.int32(number * turns * len(shapes))
        wrong = draw.choice(programs)(put(micros[number]), tick, wrong, comms[1])
        done += turns * len(shapes)
        if memory and number % 16 == 0:
            missing = memory.missing()
            if any(missing) or time.perf_counter() - started > seconds:
                break
    jax.block_until_ready(wrong)
    return {
        "all_reduces": done,
        "wrong": int(np.asarray(wrong).sum()),
        "missing": memory.missing() if memory else missing,
        "shapes": len(shapes),
        "orders": ORDERS,
        "paused_s": [round(x, 2) for x in (micros.sum((0, 2)) / 1e6).tolist()],
        "longest_pause_s": round(float(micros.max()) / 1e6, 3),
        "compile_s": round(compiled - started, 1),
        "run_s": round(time.perf_counter() - compiled, 1),
        "seed": seed,
    }
