"""What to time of range_attention, and the sizes to try."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem
from pallas_kernels.range_attention.cases import runs, windows
from pallas_kernels.range_attention.triton import features

TUNED_BY = ("head_dim", "itemsize", "most")
"""Features that a table of sizes keeps apart."""

SIDE = 74
"""Patches along a picture of 1,024 pixels in Qwen2.5-VL."""
WINDOW = 8
"""Patches along a window of it."""
Shape = tuple[str, int, int, int, int, tuple[int, ...] | None, int | None]
"""name, times, patches, heads, head dim, runs of patches or None for tiles, most of a window"""
SHAPES: tuple[Shape, ...] = (
    ("qwen2.5-vl picture", 1, 6144, 16, 80, (SIDE**2,), None),
    ("qwen2.5-vl windows", 1, 6144, 16, 80, windows(SIDE, SIDE, WINDOW), WINDOW**2),
    ("qwen2-vl 4 pictures", 1, 6144, 16, 80, (1024,) * 4, None),
    ("qwen3-vl picture", 1, 4096, 16, 72, (4096,), None),
    ("gemma-3 tile", 1, 4096, 16, 72, None, None),
    ("llava 4 tiles", 4, 577, 16, 64, None, None),
    ("smolvlm 17 tiles", 17, 1024, 12, 64, None, None),
)


def problem(shape: Shape, *, calls: int, dtype: Any) -> Problem:
    """A call's result is the next one's q."""
    name, times, patches, heads, head_dim, lengths, most = shape
    heads_of = jax.ShapeDtypeStruct((times, patches, heads, head_dim), dtype)

    def build(key: jax.Array) -> Any:
        first, *keys = jax.random.split(key, 1 + 2 * calls)
        q, *others = (jax.random.normal(each, heads_of.shape, dtype) for each in (first, *keys))
        ranges = ()
        if lengths is not None:
            ranges = tuple(jnp.tile(x, (times, 1)) for x in runs(lengths, patches, alone=True))
        return q, ranges, list(zip(others[::2], others[1::2], strict=True))

    def step(run, q, ranges, turn):
        return run(q, *turn, *ranges, most=most, scale=head_dim**-0.5)

    pairs = patches**2 if lengths is None else sum(x**2 for x in lengths)
    return Problem(
        name=name,
        features=features(heads_of, most),
        bytes=4.0 * heads_of.size * heads_of.dtype.itemsize,
        flops=4.0 * times * heads * head_dim * pairs,
        calls=calls,
        build=build,
        step=step,
    )


def problems() -> list[Problem]:
    """Real shapes, bfloat16."""
    return [problem(shape, calls=4, dtype=jnp.bfloat16) for shape in SHAPES]


def smoke() -> list[Problem]:
    shapes: tuple[Shape, ...] = (
        ("tiny", 1, 48, 2, 24, (20, 20), None),
        ("tiny windows", 1, 48, 2, 24, (16, 4, 16, 4), 16),
        ("tiny tiles", 2, 20, 2, 24, None, None),
    )
    return [problem(shape, calls=2, dtype=jnp.float32) for shape in shapes]


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    if implementation != "triton":
        return []
    if features["most"]:
        shapes = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (32, 32, 2, 2),
                  (64, 64, 2, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 128, 4, 2)]  # fmt: skip
    else:
        shapes = [(128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
                  (128, 128, 8, 2), (128, 128, 4, 2), (64, 64, 4, 3), (64, 128, 4, 3),
                  (128, 32, 4, 4), (256, 64, 8, 3)]  # fmt: skip
    names = ("rows", "block", "num_warps", "num_stages")
    return [dict(zip(names, shape, strict=True)) for shape in shapes]
