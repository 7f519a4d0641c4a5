"""What to time of rope_kv_write, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem, random_pools

# (N, K, H, norms)
MODELS = {
    "llama-8b": (32, 8, 128, False), "qwen3-8b": (32, 8, 128, True),
    "qwen-0.5b": (14, 2, 64, False),
}  # fmt: skip
TOKENS = (1, 8, 256, 8192)


def problem(
    heads: int, kv_heads: int, head_dim: int, norm: bool, tokens: int, *,
    name: str, page_size: int, pool_tokens: int, calls: int, dtype: Any,
) -> Problem:  # fmt: skip
    size = (heads + 2 * kv_heads) * head_dim
    itemsize = jnp.dtype(dtype).itemsize

    def build(key):
        keys = jax.random.split(key, 4)
        pages = pool_tokens // page_size
        pools = random_pools(keys[0], (pages, page_size, kv_heads, head_dim), dtype)
        qkvs = [
            jax.random.normal(k, (tokens, size), dtype) for k in jax.random.split(keys[1], calls)
        ]
        qs = [jnp.zeros((tokens, heads, head_dim), dtype) for _ in range(calls)]
        angles = jax.random.uniform(keys[2], (tokens, head_dim // 2), jnp.float32, 0.0, 6.0)
        first_page = jnp.zeros(1, jnp.int32)
        scales = [jnp.ones((head_dim,), dtype)] * (2 if norm else 0)
        slots = [
            jax.random.permutation(k, pool_tokens)[:tokens].astype(jnp.int32)
            for k in jax.random.split(keys[3], calls)
        ]
        return (pools, qkvs, qs), (jnp.cos(angles), jnp.sin(angles), first_page, *scales), slots

    def step(run, carry, fixed, slots):
        # every q is kept, and no two calls have the same qkv: XLA would drop or share their work
        pools, qkvs, qs = carry
        cos, sin, *others = fixed
        q, *pools = run(qkvs[0], cos, sin, *pools, slots, *others, num_heads=heads)
        return tuple(pools), [*qkvs[1:], qkvs[0]], [*qs[1:], q]

    return Problem(
        name=name,
        features={
            "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "itemsize": itemsize,
        },
        bytes=tokens * (2.0 * size * itemsize + 4.0 * head_dim),
        flops=0.0,
        calls=calls,
        build=build,
        step=step,
    )  # fmt: skip


def problems() -> list[Problem]:
    """Real shapes, bfloat16."""
    return [
        problem(
            *shape, tokens, name=f"{model} T={tokens}", page_size=64, pool_tokens=1 << 18,
            calls=256 if tokens < 1024 else 16, dtype=jnp.bfloat16,
        )
        for model, shape in MODELS.items()
        for tokens in TOKENS
    ]  # fmt: skip


def smoke() -> list[Problem]:
    return [
        problem(
            4, 2, 64, True, 8, name="tiny", page_size=16, pool_tokens=256, calls=2,
            dtype=jnp.float32,
        )
    ]  # fmt: skip


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    if implementation != "triton":
        return []
    few = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (4, 1, 2), (8, 1, 1), (8, 2, 2), (4, 2, 1)]
    many = [(8, 1, 2), (16, 1, 4), (8, 4, 2), (16, 2, 4), (16, 4, 4), (32, 2, 4), (16, 8, 4),
            (32, 4, 8)]  # fmt: skip
    shapes = few if features["tokens"] <= 16 else few[2:] + many
    return [
        {"tokens": tokens, "heads": heads, "num_warps": warps} for tokens, heads, warps in shapes
    ]
