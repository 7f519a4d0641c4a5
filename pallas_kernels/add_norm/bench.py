"""What to time of add_norm, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem

MODELS = {"llama-8b": 4096, "qwen-0.5b": 896}
TOKENS = (16, 256, 8192)


def problem(size: int, tokens: int, *, name: str, calls: int, dtype: Any) -> Problem:
    """A call's total is the next one's x, as in a model."""
    itemsize = jnp.dtype(dtype).itemsize

    def build(key: jax.Array) -> Any:
        keys = jax.random.split(key, calls + 1)
        x = jax.random.normal(keys[0], (tokens, size), dtype)
        normed = [jnp.zeros((tokens, size), dtype) for _ in range(calls)]
        ys = [jax.random.normal(k, (tokens, size), dtype) for k in keys[1:]]
        return (x, normed), (jnp.ones((size,), dtype),), ys

    def step(run, carry, fixed, y):
        x, normed = carry  # every result is kept, or XLA would drop what makes it
        x, latest = run(x, y, *fixed)
        return x, [*normed[1:], latest]

    return Problem(
        name=name,
        features={"tokens": tokens, "size": size, "itemsize": itemsize},
        bytes=4.0 * tokens * size * itemsize,
        flops=0.0,
        calls=calls,
        build=build,
        step=step,
    )


def problems() -> list[Problem]:
    """Real shapes, bfloat16."""
    return [
        problem(
            size, tokens, name=f"{model} T={tokens}", calls=64 if tokens < 1024 else 16,
            dtype=jnp.bfloat16,
        )
        for model, size in MODELS.items()
        for tokens in TOKENS
    ]  # fmt: skip


def smoke() -> list[Problem]:
    return [problem(96, 4, name="tiny", calls=2, dtype=jnp.float32)]


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    if implementation != "triton":
        return []
    width = features["size"]
    return [
        {"rows": rows, "num_warps": warps}
        for rows, warps in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (8, 8))
        if rows * width <= 8192 * warps // 4
    ]
