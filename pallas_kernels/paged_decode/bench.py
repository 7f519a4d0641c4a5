"""What to time of paged_decode, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem, random_pools, rotating_tables
from pallas_kernels.paged_decode.splits import most_in_cluster
from pallas_kernels.paged_features import paged_features

MODELS = {"llama-8b": (32, 8, 128), "qwen-0.5b": (14, 2, 64)}
# (rows, context) for each model; those of a few rows also with locks, in one launch
FEW_ROWS = [(rows, context) for rows in (1, 8) for context in (256, 1024, 4096, 32768)]
MANY_ROWS = [(rows, context) for rows in (64, 256) for context in (512, 1024)]
FP8_ROWS = [(1, 1024), (256, 512), (256, 1024)]
"""Of llama-8b, with fp8 pages."""
PAGE_SIZE, WIDTH = 64, 512


def problem(
    heads: int, kv_heads: int, head_dim: int, rows: int, context: int, *,
    name: str, page_size: int, width: int, pool_tokens: int, calls: int, dtype: Any, locked: bool,
    kv_dtype: Any = None,
) -> Problem:  # fmt: skip
    """kv_dtype: of the pages, as dtype if None."""
    pages = pool_tokens // page_size
    queries = jax.ShapeDtypeStruct((rows, heads, head_dim), dtype)
    pool = jax.ShapeDtypeStruct((pages, page_size, kv_heads, head_dim), kv_dtype or dtype)

    def build(key):
        keys = jax.random.split(key, 3)
        pools = random_pools(keys[0], pool.shape, pool.dtype)
        tables = rotating_tables(
            keys[1], calls=calls, rows=rows, live=-(-context // page_size), width=width, pages=pages
        )
        q = jax.random.normal(keys[2], (rows, heads, head_dim), dtype)
        carry = (q, jnp.zeros(rows * kv_heads, jnp.int32)) if locked else (q,)
        return carry, (*pools, jnp.full((rows,), context, jnp.int32)), tables

    def step(run, carry, fixed, table):
        k_pages, v_pages, lengths = fixed
        q, *locks = carry
        out = run(q, k_pages, v_pages, table, lengths, *locks, scale=head_dim**-0.5)
        return out if locked else (out,)

    return Problem(
        name=name,
        features={"batch": rows, **paged_features(queries, pool)},
        bytes=2.0 * rows * context * kv_heads * head_dim * pool.dtype.itemsize,
        flops=4.0 * rows * context * heads * head_dim,
        calls=calls,
        build=build,
        step=step,
    )  # fmt: skip


def problems() -> list[Problem]:
    """Real shapes, bfloat16, some with fp8 pages; the pool of 2^19 tokens is far larger than an
    L2."""
    shapes = [
        (model, rows, context, None) for model in MODELS for rows, context in FEW_ROWS + MANY_ROWS
    ]
    shapes += [("llama-8b", rows, context, jnp.float8_e4m3fn) for rows, context in FP8_ROWS]
    return [
        problem(
            *MODELS[model], rows, context,
            name=f"{model} B={rows} ctx {context}{' fp8' * bool(fp8)}{' locks' * locked}",
            page_size=PAGE_SIZE, width=WIDTH, pool_tokens=1 << 19, calls=16, dtype=jnp.bfloat16,
            locked=locked, kv_dtype=fp8,
        )
        for model, rows, context, fp8 in shapes
        for locked in ((False, True) if (rows, context) in FEW_ROWS else (False,))
    ]  # fmt: skip


def smoke() -> list[Problem]:
    return [
        problem(
            4, 2, 64, 2, 40, name=f"tiny{' fp8' * bool(fp8)}{' locks' * locked}", page_size=16,
            width=8, pool_tokens=512, calls=2, dtype=jnp.bfloat16, locked=locked, kv_dtype=fp8,
        )
        for locked, fp8 in ((False, None), (True, None), (False, jnp.float8_e4m3fn))
    ]  # fmt: skip


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    rows = features["batch"] * features["kv_heads"]
    splits = [n for n in (1, 2, 4, 8, 16, 32, 64) if 64 <= rows * n <= 2048] or [1]
    if implementation == "triton":
        shapes = [(32, 4, 5), (64, 2, 3), (64, 4, 3), (64, 4, 5), (64, 4, 7), (64, 8, 3),
                  (128, 2, 5), (128, 4, 3), (128, 4, 5), (128, 8, 3), (256, 4, 3)]  # fmt: skip
        if features["kv_itemsize"] == 1:  # twice the tokens in the bytes; 4 stages are as 3
            shapes += [(64, 4, 2), (128, 4, 2), (128, 4, 7), (128, 8, 2), (128, 8, 5),
                       (256, 8, 2), (256, 8, 3), (256, 8, 5)]  # fmt: skip
        tried = [
            {"block": block, "num_warps": warps, "num_stages": stages}
            for block, warps, stages in shapes
        ]
        # how far to split goes with the tile, so both the usual one and a small or large one
        other = tried[8] if features["head_dim"] <= 64 else tried[0]
        return tried + [{**sizes, "splits": n} for n in splits for sizes in (tried[2], other)]
    if implementation == "mosaic_sm90":
        tried = [{"block": 64, "stages": n} for n in (2, 3, 4)] + [{"block": 128, "stages": 2}]
        return tried + [{**tried[0], "splits": n} for n in splits]
    if implementation == "mosaic_cluster":
        shapes = [(64, 2), (64, 3), (64, 4), (64, 6), (128, 1), (128, 2), (128, 3)]
        most = most_in_cluster(features["head_dim"])
        blocks = [n for n in (2, 4, 8, 16) if n <= most and 16 <= rows * n <= 256]
        return [{"block": block, "stages": stages, "splits": n} for n in blocks
                for block, stages in shapes]  # fmt: skip
    return []
