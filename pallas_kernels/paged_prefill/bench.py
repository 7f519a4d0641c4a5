"""What to time of paged_prefill, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem, random_pools, rotating_tables
from pallas_kernels.paged_features import paged_features

MODELS = {
    "llama-8b": (32, 8, 128),
    "qwen-0.5b": (14, 2, 64),
    "gemma-3-4b": (8, 4, 256),
    "phi-3-mini": (32, 32, 96),
}
# (model, sequences, new tokens each, prefix of each)
SHAPES = (
    ("llama-8b", 8, 2048, 0), ("llama-8b", 16, 512, 0), ("llama-8b", 8, 512, 1536),
    ("llama-8b", 1, 8192, 0), ("llama-8b", 1, 512, 0), ("llama-8b", 64, 64, 256),
    ("qwen-0.5b", 16, 512, 0), ("qwen-0.5b", 8, 2048, 0), ("gemma-3-4b", 16, 512, 0),
    ("gemma-3-4b", 4, 2048, 0), ("phi-3-mini", 16, 512, 0),
)  # fmt: skip
PICTURE = 256  # tokens that see each other
PICTURE_SHAPES = (("gemma-3-4b", 16, 512, 0), ("llama-8b", 16, 512, 0))
FP8_SHAPES = (("llama-8b", 16, 512, 0), ("llama-8b", 8, 512, 1536))
PAGE_SIZE, WIDTH = 64, 128


def problem(
    heads: int, kv_heads: int, head_dim: int, rows: int, new: int, prefix: int, *,
    name: str, page_size: int, width: int, pool_tokens: int, calls: int, dtype: Any,
    kv_dtype: Any = None, picture: int = 0,
) -> Problem:  # fmt: skip
    """kv_dtype: of the pages, as dtype if None. picture: each run of so many tokens sees all of
    itself; 0 is causal."""
    pages, tokens = pool_tokens // page_size, rows * new
    queries = jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype)
    pool = jax.ShapeDtypeStruct((pages, page_size, kv_heads, head_dim), kv_dtype or dtype)

    def build(key):
        keys = jax.random.split(key, 3)
        pools = random_pools(keys[0], pool.shape, pool.dtype)
        live = -(-(new + prefix) // page_size)
        tables = rotating_tables(
            keys[1], calls=calls, rows=rows, live=live, width=width, pages=pages
        )
        q = jax.random.normal(keys[2], (tokens, heads, head_dim), dtype)
        lens = (
            jnp.arange(rows, dtype=jnp.int32) * new,
            jnp.full((rows,), new, jnp.int32),
            jnp.full((rows,), prefix, jnp.int32),
        )
        pictures = ()
        if picture:
            ends = (jnp.arange(new, dtype=jnp.int32) // picture + 1) * picture - 1
            pictures = (jnp.tile(prefix + jnp.minimum(ends, new - 1), rows),)
        return q, (*pools, *lens, *pictures), tables

    def step(run, q, fixed, table):
        k_pages, v_pages, starts, lens, prefixes, *pictures = fixed
        options = {"scale": head_dim**-0.5, **({"reach": pictures[0]} if pictures else {})}
        return run(q, k_pages, v_pages, table, starts, lens, prefixes, **options)

    # (query, key) pairs of a sequence
    pairs = new * prefix + new * (new + 1) / 2
    if picture:
        pairs += new // picture * picture * (picture - 1) / 2
    kv_bytes = 2.0 * rows * (new + prefix) * kv_heads * head_dim * pool.dtype.itemsize
    return Problem(
        name=name,
        features={"tokens": tokens, **paged_features(queries, pool)},
        bytes=kv_bytes + 2.0 * tokens * heads * head_dim * queries.dtype.itemsize,
        flops=4.0 * rows * heads * head_dim * pairs,
        calls=calls,
        build=build,
        step=step,
    )  # fmt: skip


def problems() -> list[Problem]:
    """Real shapes, bfloat16, some with fp8 pages, some of pictures."""
    return [
        problem(
            *MODELS[model], rows, new, prefix,
            name=f"{model} {rows} x {new} + {prefix}{name}",
            page_size=PAGE_SIZE, width=WIDTH, pool_tokens=1 << 18, calls=4, dtype=jnp.bfloat16,
            kv_dtype=fp8, picture=picture,
        )
        for name, shapes, fp8, picture in (
            ("", SHAPES, None, 0), (" fp8", FP8_SHAPES, jnp.float8_e4m3fn, 0),
            (" pictures", PICTURE_SHAPES, None, PICTURE),
        )
        for model, rows, new, prefix in shapes
    ]  # fmt: skip


def smoke() -> list[Problem]:
    return [
        problem(
            2, 1, 64, 2, 24, 8, name=f"tiny{name}", page_size=16, width=4, pool_tokens=512,
            calls=2, dtype=jnp.bfloat16, kv_dtype=fp8, picture=picture,
        )
        for name, fp8, picture in (
            ("", None, 0), (" fp8", jnp.float8_e4m3fn, 0), (" pictures", None, 12)
        )
    ]  # fmt: skip


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    if implementation == "triton":
        shapes = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 5), (64, 64, 4, 3), (64, 32, 4, 5),
                  (128, 32, 4, 5), (128, 128, 8, 3), (64, 128, 4, 3)]  # fmt: skip
        if features["kv_itemsize"] == 1:
            shapes += [(128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 5), (64, 64, 4, 2),
                       (64, 64, 4, 5)]  # fmt: skip
        return [
            {"rows": rows, "block": block, "num_warps": warps, "num_stages": stages}
            for rows, block, warps, stages in shapes
        ]
    if implementation == "mosaic_sm90":
        if features["head_dim"] > 128:
            return [
                {"block": 64, "stages": 2, "queries": 1, "turns": turns, "packed": packed}
                for turns in (0, 1)
                for packed in (1, 2, 4, 8)
                if features["group"] % packed == 0
            ]
        packs = {divisor for divisor in range(1, 9) if features["group"] % divisor == 0}
        stages = 4 if features["head_dim"] <= 64 else 2  # of 128 keys
        tiles = [
            {"block": block, "stages": stages}
            for block, stages in ((64, 3), (64, 4), (64, 5), (128, stages), (128, stages - 1))
            if stages > 1
        ]
        schedules = [{**tiles[at], "turns": 0} for at in (1, 3)]
        return [*tiles, *schedules, *({**tiles[3], "packed": packed} for packed in sorted(packs))]
    return []
