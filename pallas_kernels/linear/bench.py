"""What to time of linear, and the sizes to try."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Problem
from pallas_kernels.linear.cases import Case, layouts, products
from pallas_kernels.registry import traced_once

WEIGHT_BYTES = 160e6
"""Of all weight matrices together: more than three times an H100's L2."""
LEAST_CALLS = 8


def problem(case: Case, *, weight_bytes: float, dtype: Any) -> Problem:
    """Each call multiplies by the next of several weight matrices and adds the previous result as
    its residual (also where the model would not: a few KB), so calls wait for each other."""
    kinds = jnp.dtype(dtype if case.weights is None else case.weights)
    bytes_each = case.size_in * case.columns * kinds.itemsize
    sets = math.ceil(weight_bytes / bytes_each)
    calls = max(sets, LEAST_CALLS)
    shape = (case.size_in, case.columns)
    shape = shape[::-1] if case.transposed else shape

    def weights(key):
        if kinds == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return (jax.random.normal(key, shape, dtype) / math.sqrt(case.size_in)).astype(kinds)

    def build(key: jax.Array) -> Any:
        keys = jax.random.split(key, sets + 3)
        make = jax.jit(weights)
        pool = [make(k) for k in keys[3:]]
        x = jax.random.normal(keys[0], (case.rows, case.size_in), dtype)
        bias = jax.random.normal(keys[1], (case.columns,), dtype) if case.bias else None
        norm = jnp.ones((case.size_in,), dtype) if case.norm else None
        step = 1e-3 * jnp.ones((case.columns,), jnp.float32)
        carry = jax.random.normal(keys[2], (case.rows, case.size_out), dtype)
        fixed = (x, bias, norm, None if case.weights is None else step)
        return carry, fixed, [pool[i % sets] for i in range(calls)]

    def step(run, carry, fixed, w):
        x, bias, norm, scale = fixed
        # or XLA would compute the norm, and products that come twice, only once
        x, carry = jax.lax.optimization_barrier((x, carry))
        once = traced_once(run, tuple(case.options))  # a single kernel for all the calls
        return once(x, w, bias, norm, carry, scale, **case.options)

    return Problem(
        name=case.name,
        features={
            "rows": case.rows, "size_in": case.size_in, "size_out": case.size_out,
            "gated": int(case.act is not None), "itemsize": kinds.itemsize,
            "transposed": int(case.transposed),
        },
        bytes=float(bytes_each),
        flops=2.0 * case.rows * case.size_in * case.columns,
        calls=calls,
        build=build,
        step=step,
    )  # fmt: skip


def problems() -> list[Problem]:
    """Real products, bfloat16 (and quantized for one row), w in both layouts."""
    cases = [
        case for model in ("llama-8b", "qwen-0.5b") for rows in (1, 8, 16)
        for case in products(model, rows)
    ]  # fmt: skip
    for weights in ("float8_e4m3fn", "int8"):
        cases += products("llama-8b", 1, weights)
    return [
        problem(case, weight_bytes=WEIGHT_BYTES, dtype=jnp.bfloat16)
        for case in layouts(tuple(cases))
    ]


def smoke() -> list[Problem]:
    case = Case("tiny", 2, 64, 32, norm=True, act="silu")
    return [problem(case, weight_bytes=2e4, dtype=jnp.bfloat16)]


def sweep(implementation: str, features: dict[str, int]) -> list[dict[str, int]]:
    """Sizes to try."""
    if implementation != "triton":
        return []
    streams = 1 + features["gated"]
    tried = []
    # tensor cores: (block_n, block_k, warps, stages)
    for block_n, block_k, warps, stages in (
        (16, 128, 4, 7), (16, 256, 4, 5), (16, 256, 4, 7), (32, 128, 4, 5), (32, 128, 4, 7),
        (64, 64, 4, 6), (64, 128, 4, 4), (128, 64, 4, 5),
    ):  # fmt: skip
        tried.append({"block_n": block_n, "block_k": block_k, "num_warps": warps,
                      "num_stages": stages, "mma": 1})  # fmt: skip
    if features["rows"] <= 2:
        # multiply-adds: (numbers a tile, block_n, warps, stages)
        for numbers, block_n, warps, stages in (
            (4096, 16, 4, 2), (8192, 16, 4, 2), (8192, 16, 4, 1), (16384, 16, 8, 2),
            (8192, 32, 4, 2), (8192, 32, 4, 1), (16384, 32, 8, 2), (8192, 64, 4, 2),
            (4096, 8, 4, 2), (8192, 8, 4, 2), (8192, 8, 8, 2), (4096, 4, 4, 2),
        ):  # fmt: skip
            block_k = numbers // (streams * block_n)
            tried.append({"block_n": block_n, "block_k": block_k, "num_warps": warps,
                          "num_stages": stages, "mma": 0})  # fmt: skip
    tried = [sizes for sizes in tried if sizes["block_k"] < 2 * features["size_in"]]
    blocks = -(-features["size_out"] // 32)
    best = {"block_n": 32, "block_k": 128, "num_warps": 4, "num_stages": 5}
    if features["rows"] == 1:
        best |= {"block_k": 256 // streams, "num_stages": 2, "mma": 0}
    few = [{**best, "splits": n} for n in (2, 4, 8) if 66 <= blocks * n <= 1056]
    return [*tried, *few, {**best, "evict_first": 0}]
