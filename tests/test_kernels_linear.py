"""linear: every implementation against the float32 reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Device, available_implementations, compat, linear
from pallas_kernels.linear import activations, bench, cases
from pallas_kernels.linear import triton as kernel
from tests.kernels.support import (
    ON_GPU,
    assert_close,
    fresh_seed,
    implementation,
    needs_gpu,
    poison,
    quiet,
    reference,
)
from tests.marks import long, long_but

pytestmark = quiet
interpreting = pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
EDGES = {case.name: case for case in cases.EDGES}
by_name = {"ids": lambda case: case.name}
want = reference("linear")
MMA = {"block_n": 16, "block_k": 64, "num_stages": 3}
FMA = {"block_n": 16, "block_k": 64, "num_stages": 2, "mma": False}
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)


def check(case, name, dtype, *, seed=0, interpret=False, **sizes):
    arrays = case.inputs(seed, jnp.dtype(dtype))
    run = implementation("linear", name, interpret=interpret, **sizes)
    poison((case.rows, case.size_out), jnp.dtype(dtype))
    got = jax.jit(functools.partial(run, **case.options))(*arrays)
    assert got.dtype == jnp.dtype(dtype)
    assert_close(got, want(*arrays, **case.options), dtype)


@pytest.mark.parametrize("dtype", ["float32", long("bfloat16")])
@pytest.mark.parametrize("case", cases.EDGES, **by_name)
def test_xla(case, dtype):
    check(case, "xla", dtype)


# each case in one of its layouts: as it is, and transposed, in turn
IN_TURN = [
    case.name
    for i, case in enumerate(cases.EDGES)
    if case.transposed == bool(i % (len(EDGES) // 2) % 2)
]


@interpreting
@pytest.mark.parametrize("case", long_but(cases.EDGES, *IN_TURN), **by_name)
def test_triton_interpreted(case):
    check(case, "triton", "bfloat16", interpret=True)


@interpreting
@pytest.mark.parametrize(
    ("case", "dtype", "sizes"),
    [
        long("qkv", "float32", MMA),
        long("qkv one row", "float32", FMA),
        long("qkv one row transposed", "bfloat16", MMA),
        ("o", "float16", MMA),
        ("o transposed", "float32", {**MMA, "evict_first": False}),
        long("gate_up", "bfloat16", {**MMA, "splits": 2}),
        long("gate_up one row", "bfloat16", {**FMA, "splits": 2}),
        long("odd sizes", "float32", {**MMA, "splits": 2}),
        ("odd sizes transposed", "bfloat16", {**MMA, "splits": 2}),
        long("odd sizes one row", "float16", FMA),
        long("odd sizes one row", "float32", {**FMA, "splits": 2}),
        ("odd sizes one row transposed", "bfloat16", {**FMA, "num_stages": 1}),
        ("odd sizes one row transposed", "bfloat16", {**FMA, "block_n": 8, "block_k": 16}),
        ("down one row", "float32", {**FMA, "num_stages": 4}),
        ("down one row", "float32", {**FMA, "splits": 4}),  # the last split has no tile
        long("down one row transposed", "float32", {**MMA, "splits": 4}),
        long("qkv", "bfloat16", FMA),
        long("qkv transposed", "float16", {**FMA, "splits": 2}),
        ("int8", "float32", {**MMA, "splits": 2}),
        long("int8 one row transposed", "float16", FMA),
        long("fp8", "float32", MMA),
        ("fp8 one row", "float16", {**FMA, "splits": 3}),
    ],
)
def test_triton_sizes(case, dtype, sizes):
    check(EDGES[case], "triton", dtype, interpret=True, **sizes)


@pytest.mark.parametrize("act", [None, "silu", long("gelu"), "gelu_pytorch_tanh", long("relu")])
def test_xla_is_the_models_own_mathematics(act):
    layers = pytest.importorskip("jaxserve.models.layers")
    case = cases.Case("model", 6, 96, 64, norm=True, bias=True, act=act, residual=True, eps=1e-5)
    x, w, bias, norm, residual, _ = map(jnp.asarray, (*case.inputs(3, np.float32)[:5], 0))
    y = layers.rms_norm(x, norm, case.eps) @ w + bias
    if act is not None:
        gate, up = jnp.split(y, 2, axis=-1)
        y = layers.activation(act)(gate) * up
    got = linear(
        x, w, bias=bias, norm=norm, eps=case.eps, residual=residual, act=act, implementation="xla"
    )
    np.testing.assert_allclose(got, residual + y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activations_of_a_kernel(name):
    x = jnp.concatenate([jnp.linspace(-12, 12, 4001), jnp.asarray([-1e4, -90.0, 0.0, 90.0, 1e4])])
    got = activations.apply_in_kernel(name, x)
    np.testing.assert_allclose(got, activations.apply(name, x), rtol=2e-6, atol=3e-6)


def test_other_names_of_activations():
    case = EDGES["relu"]
    x, w, *_ = case.inputs(0, np.float32)
    for other, name in (("swish", "silu"), ("gelu_new", "gelu_pytorch_tanh")):
        np.testing.assert_array_equal(linear(x, w, act=other), linear(x, w, act=name))


def shapes(case, dtype=jnp.bfloat16):
    narrow = dtype if case.weights is None else jnp.dtype(case.weights)
    w = (case.size_in, case.columns)
    every = (
        ((case.rows, case.size_in), dtype, True),
        (w[::-1] if case.transposed else w, narrow, True),
        ((case.columns,), dtype, case.bias),
        ((case.size_in,), dtype, case.norm),
        ((case.rows, case.size_out), dtype, case.residual),
        ((case.columns,), jnp.float32, case.weights is not None),
    )
    return [jax.ShapeDtypeStruct(*some) if there else None for *some, there in every]


def lowers(case, dtype=jnp.bfloat16, **sizes):
    run = implementation("linear", "triton", interpret=False, **sizes)
    text = compat.lower_for_cuda(functools.partial(run, **case.options), *shapes(case, dtype))
    assert text.count("stablehlo.custom_call") == (2 if sizes.get("splits", 1) > 1 else 1)


@pytest.mark.parametrize(
    ("model", "rows", "transposed"),
    [
        ("llama-8b", 1, True),
        ("qwen-0.5b", 8, False),
        ("qwen-0.5b", 16, True),
        long("llama-8b", 1, False),
        long("llama-8b", 8, False),
        long("llama-8b", 8, True),
        long("llama-8b", 16, False),
        long("llama-8b", 16, True),
        long("qwen-0.5b", 1, False),
        long("qwen-0.5b", 1, True),
        long("qwen-0.5b", 8, True),
        long("qwen-0.5b", 16, False),
    ],
)
def test_lowers_for_cuda(model, rows, transposed):
    products = cases.products(model, rows)
    for case in cases.layouts(products)[len(products) if transposed else 0 :][:4]:
        lowers(case)


@pytest.mark.parametrize("case", long_but(cases.EDGES, *IN_TURN), **by_name)
def test_edges_lower_for_cuda(case):
    lowers(case)


@pytest.mark.parametrize(
    ("rows", "weights", "splits"),
    [
        (1, "int8", 4),
        (4, "float8_e4m3fn", 1),
        (1, None, 1),
        (4, None, 4),
        *(
            long(rows, weights, splits)
            for rows, weights, splits in (
                (4, "int8", 1), (4, "int8", 4), (1, "int8", 1), (1, "float8_e4m3fn", 1),
                (1, "float8_e4m3fn", 4), (4, "float8_e4m3fn", 4), (4, None, 1), (1, None, 4),
            )
        ),
    ],
)  # fmt: skip
def test_both_products_lower_for_cuda(rows, weights, splits):
    for case in cases.layouts(cases.products("qwen-0.5b", rows, weights)[1:3]):
        lowers(case, **MMA, splits=splits)
        lowers(case, **FMA, splits=splits)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_lower_for_cuda(dtype):
    for rows in (1, 4):
        for weights in (None, "int8", "float8_e4m3fn"):
            o = cases.products("qwen-0.5b", rows, weights)[1]
            lowers(o, dtype)
            lowers(o, dtype, **FMA)


def refused(message, case, dtype=jnp.bfloat16, **sizes):
    run = implementation("linear", "triton", interpret=True, **sizes)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(run, **case.options), *shapes(case, dtype))


def test_refusals(monkeypatch):
    refused("17 rows are above 16", cases.Case("many", 17, 64, 64))
    refused("5 rows are above 4", cases.Case("many", 5, 64, 64), **FMA)
    refused("overflow float16", EDGES["qkv"], jnp.float16)
    refused("32-bit indices", cases.Case("vast", 1, 1 << 15, 1 << 16, weights="int8"))
    monkeypatch.setattr(kernel, "current_device", lambda: A100)
    refused("float8_e4m3fn needs compute capability 8.9", EDGES["fp8"])


def test_default_orders():
    assert available_implementations("linear", jnp.bfloat16, H100) == ("triton", "xla")
    assert available_implementations("linear", np.float16, A100) == ("triton", "xla")
    assert available_implementations("linear", np.float32, H100) == ("xla",)
    assert available_implementations("linear", jnp.bfloat16, Device("cpu", "cpu")) == ("xla",)


def test_default_sizes_fill_the_device():
    for problem in bench.problems():
        sizes = kernel.default_sizes(H100, problem.features)
        features = problem.features
        programs = features["size_out"] / sizes.block_n
        sector = 16 if features["transposed"] else 32
        assert programs >= 1.4 * 132 or sizes.block_n * features["itemsize"] <= sector
        assert programs == int(programs)
        for size in (sizes.block_n, sizes.block_k):
            assert size & (size - 1) == 0
        # shared memory of tiles of w and x, of 227 KiB
        tile = (1 + features["gated"]) * sizes.block_n * features["itemsize"] + 16 * 2
        assert not sizes.mma or sizes.num_stages * sizes.block_k * tile <= 160 * 1024


def test_sweeps_are_sizes():
    for problem in bench.problems():
        tried = [kernel.Sizes(**sizes) for sizes in bench.sweep("triton", problem.features)]
        assert len(tried) == len(set(tried))
        for sizes in tried:
            for size in (sizes.block_n, sizes.block_k, sizes.splits):
                assert size & (size - 1) == 0 and size > 0
            assert sizes.mma or problem.features["rows"] <= kernel.MAX_FMA_ROWS


@interpreting
def test_benchmark_runs():
    for problem in bench.smoke():
        carry, fixed, rotating = problem.build(jax.random.key(0))
        assert len(rotating) == problem.calls
        run = implementation("linear", "triton", interpret=True)
        out = jax.jit(functools.partial(problem.step, run))(carry, fixed, rotating[0])
        assert out.shape == carry.shape and out.dtype == carry.dtype


def test_absent_arguments_and_many_rows():
    case = cases.Case("prefill", 33, 96, 64)
    x, w, *_ = case.inputs(0, np.float32)
    assert_close(jax.jit(linear)(x, w), want(x, w), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 9), np.float32)}, "x \\[2, 9\\], w \\[8, 6\\]: expected"),
        ({"transposed": True}, "expected \\[M, K\\] and \\[N, K\\]"),
        ({"x": np.zeros((2, 8), np.int32)}, "x has dtype int32"),
        ({"w": np.zeros((8, 6), np.float16)}, "w has dtype float16"),
        ({"w": np.zeros((8, 6), np.int8)}, "w has dtype int8"),
        ({"scale": np.zeros(6, np.float32)}, "w has dtype float32: expected int8"),
        (
            {"w": np.zeros((8, 6), np.int8), "scale": np.zeros(3, np.float32)},
            "scale is float32\\[3\\]",
        ),
        ({"bias": np.zeros(5, np.float32)}, "bias \\[5\\]: expected \\[6\\]"),
        ({"norm": np.zeros(6, np.float32)}, "norm \\[6\\]: expected \\[8\\]"),
        ({"residual": np.zeros((2, 3), np.float32)}, "residual \\[2, 3\\]"),
        ({"residual": np.zeros((2, 6), np.float16)}, "residual has dtype float16"),
        ({"act": "silu", "residual": np.zeros((2, 6), np.float32)}, "residual \\[2, 6\\]"),
        ({"act": "tanh"}, "act='tanh'"),
        ({"act": "relu", "w": np.zeros((8, 5), np.float32)}, "act='relu' with 5 columns"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"x": np.zeros((2, 8), np.float32), "w": np.zeros((8, 6), np.float32)}
    with pytest.raises(ValueError, match=message):
        linear(**{**arguments, **change})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
def test_triton_on_device(case):
    # fresh inputs every run: a result left in memory by another run cannot pass for this one's
    check(case, "triton", "bfloat16", seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", cases.LARGE, **by_name)
def test_xla_on_device(case):
    check(case, "xla", "bfloat16", seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "sizes",
    [
        MMA, FMA, {**MMA, "splits": 4}, {**FMA, "splits": 4}, {**FMA, "num_stages": 1},
        {**MMA, "block_n": 8, "block_k": 128}, {**FMA, "block_n": 8, "block_k": 512},
        {**MMA, "block_n": 64, "num_warps": 8}, {**MMA, "evict_first": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3])
def test_sizes_on_device(rows, sizes):
    for weights in (None, "int8", "float8_e4m3fn"):
        for case in cases.layouts(cases.products("qwen-0.5b", rows, weights)):
            check(case, "triton", "bfloat16", seed=fresh_seed(), **sizes)
    check(EDGES["odd sizes one row"], "triton", "bfloat16", seed=fresh_seed(), **sizes)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["o", "int8 one row", "fp8 one row transposed", "relu"])
@pytest.mark.parametrize("name", ["triton", "xla"])
def test_other_dtypes_on_device(name, case, dtype):
    check(EDGES[case], name, dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_default_order_on_device(rows):
    for case in cases.layouts(cases.products("qwen-0.5b", rows)):
        x, w, bias, norm, residual, _ = arrays = case.inputs(7, jnp.bfloat16)
        call = functools.partial(linear, eps=case.eps, act=case.act, transposed=case.transposed)
        got = jax.jit(call)(x, w, bias=bias, norm=norm, residual=residual)
        assert_close(got, want(*arrays, **case.options), "bfloat16")
