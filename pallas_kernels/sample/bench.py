"""What to time of sample, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem
from pallas_kernels.sample.api import SampleRows
from pallas_kernels.sample.cases import empty_lists, row_params

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"top_k": 1},
    "t=0.8 top_p=0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k=50": {"top_k": 50},
}
VOCABULARIES = (151_936, 128_256)
ROWS = (1, 8, 64, 256)
SLOTS = 4


def problem(setting: str, rows: int, vocab: int, scale: float, calls: int) -> Problem:
    """Logits ~ N(0, scale^2); each call has its own, and draws at positions of its own. They are
    arguments of the program, which XLA copies for the Triton kernels that change them in place: one
    more read and write than in a step, whose logits are its own."""
    params = row_params([{**SETTINGS[setting], "slot": 0, "seed": b} for b in range(rows)])
    flat = " flat" if scale < 1 else ""

    def build(key):
        make = jax.jit(lambda k: scale * jax.random.normal(k, (rows, vocab), jnp.float32))
        logits = [make(k) for k in jax.random.split(key, calls)]
        fixed = jax.tree.map(jnp.asarray, (params, empty_lists(SLOTS, vocab, bias=64, named=16)))
        return jnp.arange(rows, dtype=jnp.int32), fixed, logits

    def step(run, positions, fixed, logits):
        params, slots = fixed
        params = SampleRows(*params)._replace(position=positions)
        samples = run(logits, params, slots, top=20, raw_logprobs=False)
        return (positions + samples.tokens) & 0xFFFF

    return Problem(
        name=f"{setting}{flat} B={rows} V={vocab}",
        features={"batch": rows, "vocab": vocab},
        bytes=4.0 * rows * vocab,
        flops=0.0,
        calls=calls,
        build=build,
        step=step,
    )


def problems() -> list[Problem]:
    """Real vocabularies. Few calls of large batches: their logits alone exceed the L2."""
    found = [
        problem(setting, rows, vocab, 2.5, calls=16 if rows <= 64 else 4)
        for vocab in VOCABULARIES
        for rows in ROWS
        for setting in SETTINGS
    ]
    flat = [problem("top_k=50", rows, VOCABULARIES[0], 0.1, calls=4) for rows in (1, 256)]
    return found + flat


def smoke() -> list[Problem]:
    return [problem("t=0.8 top_p=0.95", 2, 300, 2.5, calls=2)]


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    del features
    if implementation != "triton":
        return []
    return [
        {},
        {"lanes": 128},
        {"lanes": 256, "num_warps": 2},
        {"lanes": 512, "num_warps": 2},
        {"programs": 1280},
        {"programs": 4096},
        {"rounds": 2},
        {"rounds": 3},
        {"rounds": 5},
        {"refine_lanes": 512},
        {"refine_lanes": 512, "refine_warps": 8},
        {"refine_programs": 396},
        {"refine_programs": 1320},
        {"finish_lanes": 512, "finish_warps": 8},
        {"finish_lanes": 1024, "finish_warps": 16},
    ]
