"""add_norm: every implementation against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import add_norm, compat
from pallas_kernels.add_norm import bench, cases
from tests.kernels.support import (
    ON_GPU,
    assert_close,
    fresh_seed,
    implementation,
    needs_gpu,
    poison,
    quiet,
    reference,
    shape_list,
)
from tests.marks import long, long_but

pytestmark = quiet
EDGES = {case.name: case for case in cases.EDGES}
by_name = {"ids": lambda case: case.name}
want = reference("add_norm")
DTYPES = ["float32", "bfloat16", "float16"]
SIZES = [{"rows": 1, "num_warps": 1}, {"rows": 4, "num_warps": 4}, {"rows": 8, "num_warps": 8}]


def check(case, name, dtype, *, interpret=False, seed=0, **sizes):
    x, y, norm = case.inputs(seed, jnp.dtype(dtype))
    run = implementation("add_norm", name, interpret=interpret, **sizes)
    total, normed = jax.jit(lambda *arrays: run(*arrays, eps=case.eps))(x, y, norm)
    assert total.dtype == normed.dtype == jnp.dtype(dtype)
    exact, wanted = want(x, y, norm, eps=case.eps)
    np.testing.assert_array_equal(np.asarray(total).astype(np.float32), exact)
    assert_close(normed, wanted, dtype)


@pytest.mark.parametrize("dtype", long_but(DTYPES, "bfloat16"))
@pytest.mark.parametrize("case", cases.EDGES, **by_name)
def test_xla(case, dtype):
    check(case, "xla", dtype)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("one token", "bfloat16"),
        ("qwen-0.5b", "bfloat16"),
        ("odd width", "float16"),
        ("tiny numbers", "float32"),
        ("large numbers", "float16"),
        long("smollm", "bfloat16"),
        long("odd width", "bfloat16"),
        long("tiny numbers", "float16"),
        long("large numbers", "bfloat16"),
    ],
)
def test_triton_interpreted(case, dtype):
    check(EDGES[case], "triton", dtype, interpret=True)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("odd width", SIZES[0]),
        ("qwen-0.5b", SIZES[1]),
        ("smollm", SIZES[2]),
        long("one token", SIZES[1]),
        long("qwen-0.5b", SIZES[0]),
        long("odd width", SIZES[2]),
        long("smollm", SIZES[1]),
    ],
)
def test_triton_sizes_interpreted(case, sizes):
    check(EDGES[case], "triton", "float32", interpret=True, **sizes)


@pytest.mark.parametrize(
    ("tokens", "size", "dtype"),
    [
        (1, 4096, "float32"),
        (256, 896, "bfloat16"),
        (7, 100, "bfloat16"),
        long(8192, 8192, "bfloat16"),
        long(8192, 8192, "float32"),
    ],
)
def test_lowers_for_cuda(tokens, size, dtype):
    x, norm = ((tokens, size), jnp.dtype(dtype)), ((size,), jnp.dtype(dtype))
    shapes = shape_list([x, x, norm])
    for name in ("triton", "xla"):
        text = compat.lower_for_cuda(implementation("add_norm", name, interpret=False), *shapes)
        assert ("custom_call" in text) == (name == "triton")


def test_refuses_what_no_program_can_hold():
    run = implementation("add_norm", "triton", interpret=False)
    for shape, reason in (((0, 64), "no tokens"), ((2, 20000), "wider")):
        x = jnp.zeros(shape, jnp.float32)
        with pytest.raises(NotImplementedError, match=reason):
            run(x, x, jnp.zeros(shape[1:], jnp.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 64), np.int32)}, "x has dtype int32"),
        ({"y": np.zeros((3, 64), np.float32)}, r"y \[3, 64\]"),
        ({"y": np.zeros((4, 64), np.float16)}, "y has dtype float16"),
        ({"norm": np.zeros(63, np.float32)}, r"norm \[63\]"),
        ({"norm": np.zeros(64, np.int8)}, "norm has dtype int8"),
    ],
)
def test_mistakes_are_named(change, message):
    x = np.zeros((4, 64), np.float32)
    with pytest.raises(ValueError, match=message):
        add_norm(**{"x": x, "y": x, "norm": np.ones(64, np.float32), **change})


def test_sweeps_fit_the_registers():
    for problem in bench.problems():
        sizes = bench.sweep("triton", problem.features)
        assert len(sizes) > 2
        for each in sizes:
            assert each["rows"] * problem.features["size"] / (32 * each["num_warps"]) <= 64


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_on_device(name, case, dtype):
    poison((case.tokens, case.size), jnp.dtype(dtype))
    check(case, name, dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_on_device(sizes):
    for case in (cases.LARGE[0], cases.LARGE[3]):
        check(case, "triton", "bfloat16", seed=fresh_seed(), **sizes)
