"""Programs of `sample`, each compiled once for all tests of a process."""

from __future__ import annotations

import functools

import jax
import numpy as np

from tests.kernels.support import ON_GPU, implementation

SMALL = (
    ("lanes", 256), ("programs", 10), ("rounds", 1), ("refine_lanes", 512), ("refine_programs", 15),
    ("finish_lanes", 512),
)  # fmt: skip


ALONE = (("lanes", 512), ("programs", 1), ("rounds", 0), ("finish_lanes", 256))


@functools.cache
def program(name, top, raw, sizes=()):
    """One compiled program for each shape: rows may want anything."""
    interpret = name == "triton" and not ON_GPU
    run = implementation("sample", name, interpret=interpret, **dict(sizes))
    return jax.jit(functools.partial(run, top=top, raw_logprobs=raw))


def draw(name, case, inputs, *, raw=False, sizes=()):
    result = program(name, case.top, raw, sizes)(*inputs)
    return type(result)(*map(np.asarray, result))
