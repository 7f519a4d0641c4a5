"""What to time of kv_write, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem, random_pools

# (model, K, H, tokens)
SHAPES = (
    ("llama-8b", 8, 128, 8), ("llama-8b", 8, 128, 256), ("llama-8b", 8, 128, 4096),
    ("qwen-0.5b", 2, 64, 256),
)  # fmt: skip


def problem(
    kv_heads: int, head_dim: int, tokens: int, *, name: str, page_size: int, pool_tokens: int,
    calls: int, dtype: Any,
) -> Problem:  # fmt: skip
    def build(key):
        keys = jax.random.split(key, 3)
        pages = pool_tokens // page_size
        pools = random_pools(keys[0], (pages, page_size, kv_heads, head_dim), dtype)
        new = random_pools(keys[1], (tokens, kv_heads, head_dim), dtype)
        slots = [
            jax.random.permutation(k, pool_tokens)[:tokens].astype(jnp.int32)
            for k in jax.random.split(keys[2], calls)
        ]
        return pools, new, slots

    def step(run, pools, new, slots):
        return run(*pools, *new, slots)

    return Problem(
        name=name,
        features={"tokens": tokens, "kv_heads": kv_heads, "head_dim": head_dim},
        bytes=4.0 * tokens * kv_heads * head_dim * jnp.dtype(dtype).itemsize,
        flops=0.0,
        calls=calls,
        build=build,
        step=step,
    )


def problems() -> list[Problem]:
    """Real shapes, bfloat16."""
    return [
        problem(
            kv_heads, head_dim, tokens, name=f"{model} T={tokens}", page_size=64,
            pool_tokens=1 << 18, calls=16, dtype=jnp.bfloat16,
        )
        for model, kv_heads, head_dim, tokens in SHAPES
    ]  # fmt: skip


def smoke() -> list[Problem]:
    return [
        problem(2, 64, 8, name="tiny", page_size=16, pool_tokens=256, calls=2, dtype=jnp.float32)
    ]


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Nothing to tune."""
    del implementation, features
    return []
