"""range_attention: every implementation against the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, range_attention
from pallas_kernels.range_attention import bench, cases, triton, xla
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
want = reference("range_attention")
DTYPES = ["float32", "bfloat16", "float16"]
SIZES = [
    {"rows": 16, "block": 16, "num_warps": 1, "num_stages": 2},
    {"rows": 64, "block": 128, "num_warps": 4, "num_stages": 2},
    {"rows": 128, "block": 32, "num_warps": 8, "num_stages": 3},
]


def check(case, name, dtype, *, interpret=False, seed=0, **sizes):
    arrays = case.inputs(seed, jnp.dtype(dtype))
    run = implementation("range_attention", name, interpret=interpret, **sizes)
    options = case.options
    scale = case.head_dim**-0.5 if options["scale"] is None else options["scale"]
    got = jax.jit(lambda *arrays: run(*arrays, most=options["most"], scale=scale))(*arrays)
    assert got.dtype == jnp.dtype(dtype)
    assert_close(got, want(*arrays, **options), dtype)
    if case.lengths is not None:
        empty = arrays[3] == arrays[4]
        assert not np.asarray(got)[empty].any()


@pytest.mark.parametrize("dtype", long_but(DTYPES, "float32"))
@pytest.mark.parametrize("case", cases.EDGES, **by_name)
def test_xla(case, dtype):
    check(case, "xla", dtype)


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("blocks", 2, 8, 2021, ((513, 1000, 3, 500),)),
        long(cases.Case("blocks, alone", 2, 8, 1100, ((600,),), alone=True)),
        cases.Case("tiles", 2, 8, 577, times=3),
    ],
    **by_name,
)
def test_xla_in_several_blocks(case, monkeypatch):
    """Ranges that begin and end within blocks; tiles some at a time, in blocks that they do not
    fill."""
    monkeypatch.setattr(xla, "_SCORES", 2 * 577 * 577)
    check(case, "xla", "float32")


# ranges of several cases
TOGETHER = cases.Case(
    "rows of edges", 1, 64, 320, ((63, 1, 65, 127, 64), (), (64, 36), (3, 1, 50), (60, 9))
)
WITH_TOGETHER = {**EDGES, TOGETHER.name: TOGETHER}


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("qwen2.5-vl", "bfloat16"),
        ("siglip", "float16"),
        ("head dim 100", "float32"),
        long("one patch", "float32"),
        ("rows of edges", "bfloat16"),
        ("windows", "float16"),
        ("windows and nothing", "float32"),
        ("a scale", "float32"),
        ("large scores", "float16"),
        long("nothing seen", "bfloat16"),
        long("two rows of ranges", "float32"),
        long("blocks' edges", "bfloat16"),
        long("qwen2.5-vl", "float32"),
        long("siglip", "bfloat16"),
        long("clip", "float32"),
        long("head dim 96", "bfloat16"),
        long("head dim 128", "float16"),
        long("head dim 256", "bfloat16"),
        long("head dim 8", "float32"),
        long("one patch a tile", "float16"),
        long("padding sees nothing", "float32"),
        long("a whole picture", "bfloat16"),
        long("many short", "float32"),
        long("windows", "float32"),
        long("windows of one", "bfloat16"),
        long("wide windows", "float32"),
        long("large scores", "bfloat16"),
    ],
)
def test_triton_interpreted(case, dtype):
    check(WITH_TOGETHER[case], "triton", dtype, interpret=True)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("blocks' edges", SIZES[0]),
        ("windows", SIZES[1]),
        ("siglip", SIZES[2]),
        *(long("qwen2.5-vl", sizes) for sizes in SIZES),
        long("siglip", SIZES[1]),
        long("windows", SIZES[0]),
        long("padding sees nothing", SIZES[0]),
        long("padding sees nothing", SIZES[2]),
        long("blocks' edges", SIZES[1]),
        long("windows", SIZES[2]),
    ],
)
def test_triton_sizes_interpreted(case, sizes):
    check(EDGES[case], "triton", "float32", interpret=True, **sizes)


@pytest.mark.parametrize(
    ("most", "head_dim", "dtype"),
    [
        (None, 16, "float32"),
        (64, 72, "bfloat16"),
        (64, 80, "float32"),
        ("tiles", 64, "bfloat16"),
        (None, 256, "bfloat16"),
        long(None, 64, "bfloat16"),
        long(None, 72, "float32"),
        long(None, 80, "bfloat16"),
        long(None, 96, "float32"),
        long(None, 128, "bfloat16"),
        long(64, 16, "bfloat16"),
        long(64, 64, "float32"),
        long(64, 96, "bfloat16"),
        long(64, 128, "float32"),
        long(64, 256, "float32"),
        long("tiles", 16, "bfloat16"),
        long("tiles", 72, "bfloat16"),
        long("tiles", 80, "float32"),
        long("tiles", 96, "float32"),
        long("tiles", 128, "bfloat16"),
        long("tiles", 256, "float32"),
    ],
)
def test_lowers_for_cuda(most, head_dim, dtype):
    heads, ranges = ((2, 1000, 16, head_dim), jnp.dtype(dtype)), ((2, 1000), jnp.int32)
    shapes = shape_list([heads] * 3 + [ranges] * 2 * (most != "tiles"))
    options = {"most": None if most == "tiles" else most, "scale": head_dim**-0.5}
    for name in ("triton", "xla"):
        run = implementation("range_attention", name, interpret=False)
        text = compat.lower_for_cuda(lambda *x, run=run: run(*x, **options), *shapes)
        assert ("custom_call" in text) == (name == "triton")


PROBLEMS = bench.problems()


@pytest.mark.parametrize("index", long_but(range(len(PROBLEMS)), 0, 1))
def test_sizes_of_a_sweep_lower(index):
    """The first and the last."""
    problem = PROBLEMS[index]
    arguments = jax.eval_shape(problem.build, jax.random.key(0))
    q, ranges, turns = arguments
    sweep = bench.sweep("triton", problem.features)
    assert len(sweep) > 5
    for sizes in sweep[:: len(sweep) - 1]:
        run = implementation("range_attention", "triton", interpret=False, **sizes)
        step = functools.partial(problem.step, run)
        assert "custom_call" in compat.lower_for_cuda(step, q, ranges, turns[0])


@pytest.mark.parametrize(
    ("head_dim", "pieces"),
    [
        (8, ((0, 16),)),
        (64, ((0, 64),)),
        (72, ((0, 64), (64, 16))),
        (80, ((0, 64), (64, 16))),
        (96, ((0, 64), (64, 32))),
        (100, ((0, 64), (64, 32), (96, 16))),
        (128, ((0, 128),)),
    ],
)
def test_a_head_is_cut_into_powers_of_two(head_dim, pieces):
    assert triton.pieces_of(head_dim) == pieces


def test_has_no_scores_of_all_with_all():
    """4,096 patches and 16 heads would make 1 GiB of them."""
    x = jax.ShapeDtypeStruct((1, 4096, 16, 72), jnp.float32)
    place = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    for arguments, most in (((x, x, x, place, place), None), ((x, x, x), None),
                            ((x, x, x, place, place), 64)):  # fmt: skip
        call = jax.jit(lambda *x, most=most: range_attention(*x, most=most, implementation="xla"))
        compiled = call.lower(*arguments).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 256 << 20


def test_refuses_wide_heads():
    x = jnp.zeros((1, 4, 1, 264), jnp.float32)
    with pytest.raises(NotImplementedError, match="head dim 264 is above 256"):
        implementation("range_attention", "triton", interpret=False)(x, x, x, scale=1.0)


X, PLACES = np.zeros((2, 4, 1, 16), np.float32), np.zeros((2, 4), np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X.astype(np.int32)}, "q has dtype int32"),
        ({"q": X[0]}, r"q \[4, 1, 16\]"),
        ({"q": X[:, :0]}, r"q \[2, 0, 1, 16\].*not empty"),
        ({"k": X[:1]}, r"k \[1, 4, 1, 16\]: expected \[2, 4, 1, 16\]"),
        ({"v": X.astype(np.float16)}, "v has dtype float16"),
        ({"ends": None}, "both or neither"),
        ({"starts": PLACES[0]}, r"starts is int32\[4\]"),
        ({"ends": PLACES.astype(np.int64)}, r"ends is int64"),
        ({"most": 0}, "most=0"),
        ({"starts": None, "ends": None, "most": 4}, "most=4.*without"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"implementation": "mosaic_sm90"}, "implementation='mosaic_sm90'"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"q": X, "k": X, "v": X, "starts": PLACES, "ends": PLACES}
    with pytest.raises(ValueError, match=message):
        range_attention(**{**given, **change})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_on_device(name, case, dtype):
    poison((case.times, case.patches, case.heads, case.head_dim), jnp.dtype(dtype))
    check(case, name, dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_on_device(sizes):
    """Of windows, of pictures and of tiles."""
    for case in (cases.LARGE[1], cases.LARGE[2], cases.LARGE[5]):
        check(case, "triton", "bfloat16", seed=fresh_seed(), **sizes)
