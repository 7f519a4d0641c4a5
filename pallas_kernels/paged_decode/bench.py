"""What to time of paged_decode, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem, random_pools, rotating_tables
from pallas_kernels.paged_decode.splits import HOPPER_CORES, MAX_SPLITS

MODELS = {"llama-8b": (32, 8, 128), "qwen-0.5b": (14, 2, 64)}
# (rows, context) for each model; those of a few rows also with locks, in one launch
FEW_ROWS = [(rows, context) for rows in (1, 8) for context in (256, 1024, 4096, 32768)]
MANY_ROWS = [(rows, context) for rows in (64, 256) for context in (512, 1024)]
PAGE_SIZE, WIDTH = 64, 512
SPLITS = (2, 4, 8, 16, 32, 64)
# (block, warps, stages)
FEW_SHAPES = [(16, 1, 2), (16, 2, 2), (16, 2, 3), (32, 2, 2), (32, 2, 3), (32, 4, 2), (32, 4, 3),
              (64, 4, 2), (64, 4, 3), (128, 4, 2)]  # fmt: skip


def problem(
    heads: int, kv_heads: int, head_dim: int, rows: int, context: int, *,
    name: str, page_size: int, width: int, pool_tokens: int, calls: int, dtype: Any, locked: bool,
) -> Problem:  # fmt: skip
    pages = pool_tokens // page_size

    def build(key):
        keys = jax.random.split(key, 3)
        pools = random_pools(keys[0], (pages, page_size, kv_heads, head_dim), dtype)
        tables = rotating_tables(
            keys[1], calls=calls, rows=rows, live=-(-context // page_size), width=width, pages=pages
        )
        q = jax.random.normal(keys[2], (rows, heads, head_dim), dtype)
        words = _lock_words(rows, kv_heads, heads, head_dim) if locked else 0
        carry = (q, jnp.zeros(words, jnp.int32)) if locked else (q,)
        return carry, (*pools, jnp.full((rows,), context, jnp.int32)), tables

    def step(run, carry, fixed, table):
        k_pages, v_pages, lengths = fixed
        q, *locks = carry
        out = run(q, k_pages, v_pages, table, lengths, *locks, scale=head_dim**-0.5)
        return out if locked else (out,)

    itemsize = jnp.dtype(dtype).itemsize
    return Problem(
        name=name,
        features={
            "batch": rows, "kv_heads": kv_heads, "group": heads // kv_heads, "head_dim": head_dim,
            "page_size": page_size, "itemsize": itemsize,
        },
        bytes=2.0 * rows * context * kv_heads * head_dim * itemsize,
        flops=4.0 * rows * context * heads * head_dim,
        calls=calls,
        build=build,
        step=step,
    )  # fmt: skip


def problems() -> list[Problem]:
    """Real shapes, bfloat16; the pool of 2^19 tokens is far larger than an L2."""
    return [
        problem(
            *sizes, rows, context, name=f"{model} B={rows} ctx {context}{' locks' * locked}",
            page_size=PAGE_SIZE, width=WIDTH, pool_tokens=1 << 19, calls=16, dtype=jnp.bfloat16,
            locked=locked,
        )
        for model, sizes in MODELS.items()
        for rows, context in (*FEW_ROWS, *MANY_ROWS)
        for locked in ((False, True) if (rows, context) in FEW_ROWS else (False,))
    ]  # fmt: skip


def smoke() -> list[Problem]:
    return [
        problem(
            4, 2, 64, 2, 40, name=f"tiny{' locks' * locked}", page_size=16, width=8,
            pool_tokens=512, calls=2, dtype=jnp.bfloat16, locked=locked,
        )
        for locked in (False, True)
    ]  # fmt: skip


def _lock_words(rows: int, kv_heads: int, heads: int, head_dim: int) -> int:
    """Enough for every size that `sweep` tries."""
    from pallas_kernels.paged_decode.triton import exchange_words

    return exchange_words(rows, kv_heads, heads // kv_heads, head_dim, MAX_SPLITS)


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    programs = features["batch"] * features["kv_heads"]
    if implementation == "triton":
        return _few(programs) if programs <= HOPPER_CORES else _many()
    if implementation == "mosaic_sm90":
        splits = [n for n in (1, 2, 4, 8, 16, 32, 64) if 64 <= programs * n <= 2048] or [1]
        tried = [{"block": 64, "stages": n} for n in (2, 3, 4)] + [{"block": 128, "stages": 2}]
        return tried + [{**tried[0], "splits": n} for n in splits]
    return []


def _few(programs: int) -> list[dict[str, int]]:
    """Sizes of Triton's kernel for `programs` = B*K that do not fill a device: one or two programs
    a core, or one tile a split at 1024 tokens, and both ways of merging."""
    found = [
        _sizes(block, warps, stages, splits=n, exchange=1)
        for block, warps, stages in FEW_SHAPES
        for n in SPLITS
        if programs * n in (128, 256) or (block * n == 1024 and programs * n <= 512)
    ]
    counted = [{**sizes, "exchange": 0} for sizes in found if sizes["num_warps"] == 4]
    older = [_sizes(64, 4, 3, prefetch_ids=0), _sizes(32, 4, 5, prefetch_ids=0)]
    return found + counted + older


def _many() -> list[dict[str, int]]:
    """Sizes of Triton's kernel for rows that fill a device."""
    shapes = [(32, 2, 2), (32, 2, 3), (32, 2, 4), (32, 4, 3), (64, 2, 2), (64, 4, 2), (64, 4, 3),
              (64, 4, 4), (64, 8, 2), (128, 4, 2), (128, 8, 2)]  # fmt: skip
    older = [(32, 2, 5), (64, 4, 3), (64, 4, 5), (128, 4, 3)]
    return [_sizes(*shape) for shape in shapes] + [_sizes(*s, prefetch_ids=0) for s in older]


def _sizes(block: int, warps: int, stages: int, **others: int) -> dict[str, int]:
    return {"block": block, "num_warps": warps, "num_stages": stages, **others}
