"""rope_kv_write: every implementation against the reference, and in place."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Device, compat, rope_kv_write
from pallas_kernels.kv_write import xla as kv_write_xla
from pallas_kernels.rope_kv_write import cases, triton
from pallas_kernels.rope_kv_write.pages import FP8, to_pages
from tests.kernels.support import (
    ON_GPU,
    fresh_seed,
    implementation,
    needs_gpu,
    quiet,
    reference,
    shape_list,
)
from tests.marks import long, long_but

pytestmark = quiet
EDGES = {case.name: case for case in cases.EDGES}
by_name = {"ids": lambda case: case.name}
# with other tiles most of the others are always interpreted
INTERPRETED = long_but(
    cases.EDGES, "head dim 96, norm", "second layer", "all dropped", "every slot"
)
want = reference("rope_kv_write")
# largest error of a row (one token, one head) relative to its norm: numbers next to a rounding
# boundary may fall to the other side, and angles are float32
TOLERANCE = {"float32": 2e-6, "float16": 8e-4, "bfloat16": 6e-3, "float8_e4m3fn": 6e-2}
# share of all numbers that may do so; a second rounding, or a missing one, moves far more
MOVED = {"float16": 0.02, "bfloat16": 0.02, "float8_e4m3fn": 0.02}


def assert_rotated(got, expected, *, rounds=True) -> None:
    """Row by row, and in 2-byte and 1-byte dtypes nearly all numbers equal. rounds: the norm's
    result is surely rounded; XLA may leave that out on a GPU (xla_allow_excess_precision)."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    dtype = expected.dtype.name
    ours, theirs = (np.asarray(x).astype(np.float32) for x in (got, expected))
    assert np.isfinite(ours).all()
    norm = np.linalg.norm(theirs, axis=-1)
    worst = (np.linalg.norm(ours - theirs, axis=-1) / np.maximum(norm, 1e-3)).max(initial=0.0)
    bound = TOLERANCE[dtype] * (1 if rounds else 2)
    assert worst < bound, f"relative error {worst:.2e} of a row"
    if rounds and dtype in MOVED and ours.size > 100:
        assert (ours != theirs).mean() < MOVED[dtype]


def check(case, name, dtype, *, interpret=False, seed=0, **sizes):
    arrays = case.inputs(seed, jnp.dtype(dtype))
    run = implementation("rope_kv_write", name, interpret=interpret, **sizes)
    got = jax.jit(functools.partial(run, **case.options()))(*arrays)
    q, k_pages, v_pages = map(np.asarray, got)
    want_q, want_k, want_v = want(*arrays, **case.options())
    rounds = not (ON_GPU and name == "xla" and case.norm)
    assert_rotated(q, want_q, rounds=rounds)
    np.testing.assert_array_equal(bits(v_pages), bits(want_v))
    slots = arrays[5] + case.first_page * case.page_size
    kept = slots[slots < case.pages * case.page_size]
    k, want_k, before = (flat(x) for x in (k_pages, want_k, arrays[3]))
    assert_rotated(k[kept], want_k[kept], rounds=rounds)
    untouched = np.delete(np.arange(k.shape[0]), kept)
    np.testing.assert_array_equal(bits(k[untouched]), bits(before[untouched]))


def flat(pages: np.ndarray) -> np.ndarray:
    return pages.reshape(-1, *pages.shape[2:])


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", [long("float32"), long("float16"), "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        long(x) if x.name in ("llama-8b", "qwen-0.5b", "smollm", "one token") else x
        for x in cases.EDGES
    ],
    **by_name,
)
def test_xla(case, dtype):
    check(case, "xla", dtype)


TILES = {
    "llama-8b": (1, 1),
    "fp8, norm, head dim 80": (2, 8),
    "smollm": (8, 4),
    "qwen3-8b": (16, 3),
}
"""Of each case, the tile without which no change is made."""
TILED = [
    *(long(case, *tile) if case == "smollm" else (case, *tile) for case, tile in TILES.items()),
    long("llama-8b", 8, 4),
    long("fp8, norm, head dim 80", 16, 3),
    long("smollm", 2, 8),
    long("qwen3-8b", 1, 1),
]


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize("case", INTERPRETED, **by_name)
def test_triton_interpreted(case):
    check(
        case,
        "triton",
        "float32" if case.tokens % 2 else "bfloat16",
        interpret=True,
        tokens=4,
        heads=2,
        num_warps=1,
    )


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(("case", "tokens", "heads"), TILED)
def test_triton_tiles_interpreted(case, tokens, heads):
    check(EDGES[case], "triton", "bfloat16", interpret=True, tokens=tokens, heads=heads)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    "case", ["one token", long("qwen-0.5b"), long("odd page size"), long("fp8")]
)
def test_triton_default_sizes_interpreted(case):
    check(EDGES[case], "triton", "bfloat16", interpret=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("llama-8b", "bfloat16"),
        ("qwen3-8b", "float32"),
        ("head dim 96, norm", "bfloat16"),
        long("llama-8b", "float32"),
        long("qwen3-8b", "bfloat16"),
        long("head dim 96, norm", "float32"),
        long("one token", "float32"),
        long("one token", "bfloat16"),
    ],
)
def test_xla_equals_the_composition_of_its_parts(case, dtype):
    """Bit for bit what the models computed with a split, two norms, two rotations and kv_write."""
    case = EDGES[case]

    def norm(x, scale):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + case.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)

    def rotate(x, cos, sin):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    def composed(qkv, cos, sin, k_pages, v_pages, slots, _first_page, *norms):
        groups = qkv.reshape(qkv.shape[0], case.kv_heads, -1, case.head_dim)
        group = case.heads // case.kv_heads
        q, k, v = jnp.split(groups, [group, group + 1], axis=2)
        q, k, v = (x.reshape(len(x), -1, case.head_dim) for x in (q, k, v))
        if norms:
            q, k = norm(q, norms[0]), norm(k, norms[1])
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, *kv_write_xla.kv_write(k_pages, v_pages, k, v, slots)

    arrays = case.inputs(3, jnp.dtype(dtype))
    run = implementation("rope_kv_write", "xla", interpret=False)
    got = jax.jit(functools.partial(run, **case.options()))(*arrays)
    for ours, theirs in zip(got, jax.jit(composed)(*arrays), strict=True):
        np.testing.assert_array_equal(bits(np.asarray(ours)), bits(np.asarray(theirs)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fp8_rounds_to_nearest_and_never_overflows_to_nan(dtype):
    """Every float16 and bfloat16, infinities and NaN included, in `dtype`."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        numbers = np.concatenate(
            [patterns.view(np.float16).astype(np.float32),
             patterns.view(jnp.bfloat16).astype(np.float32)]
        ).astype(jnp.dtype(dtype))  # fmt: skip
        wide = numbers.astype(np.float32)
        expected = np.clip(wide, -448, 448).astype(FP8).astype(np.float32)
    got = np.asarray(jax.jit(lambda x: to_pages(x, FP8))(numbers)).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wide))


# -- in place -------------------------------------------------------------------------------------


def assert_in_place(compiled, cache: jax.ShapeDtypeStruct) -> None:
    """The compiled program holds no copy of the cache and gives its memory back as the output."""
    size = cache.size * cache.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size // 2
    dims = {",".join(map(str, cache.shape))}
    dims.add(",".join(map(str, (cache.shape[0] * cache.shape[1], *cache.shape[2:]))))
    for line in compiled.as_text().splitlines():
        found = re.search(r"= \w+\[([\d,]+)\]\S* copy\(", line)
        assert not (found and found.group(1) in dims), line


def in_place(name, dtype, tokens, *, pages_dtype=None):
    heads, kv_heads, head_dim = 6, 3, 64
    cache = jax.ShapeDtypeStruct((4096, 16, kv_heads, head_dim), pages_dtype or dtype)
    shapes = shape_list(
        [((tokens, (heads + 2 * kv_heads) * head_dim), dtype),
         ((tokens, head_dim // 2), jnp.float32), ((tokens, head_dim // 2), jnp.float32)]
    )  # fmt: skip
    norms = shape_list([((head_dim,), dtype)] * 2)
    slots = shape_list([((tokens,), jnp.int32), ((1,), jnp.int32)])
    run = functools.partial(
        implementation("rope_kv_write", name, interpret=False), num_heads=heads, eps=1e-6
    )
    jitted = jax.jit(run, donate_argnums=(3, 4))
    assert_in_place(jitted.lower(*shapes, cache, cache, *slots, *norms).compile(), cache)


@pytest.mark.parametrize("tokens", [1, 2, 32])
def test_xla_is_in_place(tokens):
    # float32: JAX 0.10's CPU backend converts a whole bfloat16 cache to scatter into it
    in_place("xla", jnp.float32, tokens)


# -- lowering -------------------------------------------------------------------------------------

# N, K, H, norms
MODELS = {
    "llama-3.1-8b": (32, 8, 128, False),
    "qwen2.5-0.5b": (14, 2, 64, False),
    "qwen3-8b": (32, 8, 128, True),
    "smollm": (9, 3, 64, False),
}


def lowered(name, shape, tokens, dtype, pages_dtype, tile=None, *, page_count=4096):
    heads, kv_heads, head_dim, norm = shape
    pages = ((page_count, 64, kv_heads, head_dim), pages_dtype)
    angles = ((tokens, head_dim // 2), jnp.float32)
    shapes = shape_list(
        [((tokens, (heads + 2 * kv_heads) * head_dim), dtype), angles, angles, pages, pages,
         ((tokens,), jnp.int32), ((1,), jnp.int32), *([((head_dim,), dtype)] * (2 if norm else 0))]
    )  # fmt: skip
    run = implementation("rope_kv_write", name, interpret=False, **(tile or {}))
    return compat.lower_for_cuda(functools.partial(run, num_heads=heads, eps=1e-6), *shapes)


LOWERED = (
    ("llama-3.1-8b", 256, "bfloat16"),
    ("qwen2.5-0.5b", 1, "float8_e4m3fn"),
    ("qwen3-8b", 8192, "bfloat16"),
    ("smollm", 256, "float8_e4m3fn"),
)


@pytest.mark.parametrize(
    ("model", "tokens", "pages"),
    [
        *LOWERED,
        *(
            long(*case)
            for case in itertools.product(MODELS, (1, 256, 8192), ("bfloat16", "float8_e4m3fn"))
            if case not in LOWERED
        ),
    ],
)
def test_lowers_for_cuda(model, tokens, pages):
    text = lowered("triton", MODELS[model], tokens, jnp.bfloat16, jnp.dtype(pages))
    assert text.count("stablehlo.custom_call") == 1


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (80, "float16"),
        (256, "float32"),
        long(80, "float32"),
        long(256, "float16"),
        long(2, "float16"),
        long(2, "float32"),
        long(96, "float16"),
        long(96, "float32"),
    ],
)
def test_other_dtypes_and_head_dims_lower_for_cuda(head_dim, dtype):
    for pages in (jnp.dtype(dtype), FP8):
        for tokens in (1, 1000):
            shape = (8, 4, head_dim, True)
            assert "custom_call" in lowered("triton", shape, tokens, jnp.dtype(dtype), pages)


@pytest.mark.parametrize("sizes", [long((1, 8, 1)), (32, 8, 8), (64, 1, 4)], ids=str)
def test_swept_tiles_lower_for_cuda(sizes):
    tile = dict(zip(("tokens", "heads", "num_warps"), sizes, strict=True))
    assert "custom_call" in lowered(
        "triton", MODELS["qwen3-8b"], 1000, jnp.bfloat16, jnp.bfloat16, tile
    )


@pytest.mark.parametrize("pages", ["bfloat16", "float8_e4m3fn"])
def test_a_cache_beyond_32_bit_offsets_lowers_for_cuda(pages):
    pages = jnp.dtype(pages)
    count = (5 << 30) // (64 * 8 * 128 * pages.itemsize)
    text = lowered("triton", MODELS["llama-3.1-8b"], 256, jnp.bfloat16, pages, page_count=count)
    assert "custom_call" in text


# -- choices and mistakes -------------------------------------------------------------------------


def test_default_order():
    h100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
    order = pallas_kernels.available_implementations
    assert order("rope_kv_write", jnp.bfloat16, h100) == ("triton", "xla")
    assert order("rope_kv_write", jnp.bfloat16, Device("cpu", "cpu")) == ("xla",)


def test_default_sizes_fill_the_threads_and_the_device():
    h100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)

    def sizes(tokens, head_dim):
        features = {"tokens": tokens, "head_dim": head_dim, "itemsize": 2}
        return triton.default_sizes(h100, features | {"heads": 32, "kv_heads": 8})

    assert sizes(1, 128) == triton.Sizes(tokens=1, heads=1, num_warps=1)
    assert sizes(256, 128) == triton.Sizes(tokens=4, heads=1, num_warps=1)
    assert sizes(8192, 128) == triton.Sizes(tokens=16, heads=4, num_warps=4)
    assert sizes(8192, 80) == triton.Sizes(tokens=16, heads=4, num_warps=4)
    assert sizes(3, 64) == triton.Sizes(tokens=4, heads=1, num_warps=1)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "pages", "capability", "message"),
    [
        (4, 512, (2, 16), (9, 0), "head dim 512"),
        (0, 64, (2, 16), (9, 0), "no tokens"),
        (4, 64, (2, 16), (8, 0), "capability 8.9"),
        (4, 64, ((1 << 19) + 1, 64), (9, 0), "overflow 32 bits"),
    ],
)
def test_refusals(monkeypatch, tokens, head_dim, pages, capability, message):
    device = Device("gpu", "some GPU", capability, 100)
    monkeypatch.setattr(triton, "current_device", lambda: device)
    angles = jax.ShapeDtypeStruct((tokens, head_dim // 2), jnp.float32)
    cache = jax.ShapeDtypeStruct((*pages, 1, head_dim), FP8)
    qkv = jax.ShapeDtypeStruct((tokens, 4 * head_dim), jnp.bfloat16)
    slots = shape_list([((tokens,), jnp.int32), ((1,), jnp.int32)])
    run = functools.partial(triton.rope_kv_write, num_heads=2)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(run, qkv, angles, angles, cache, cache, *slots)


def arguments():
    return {
        "qkv": np.zeros((4, 8 * 64), np.float32),
        "cos": np.ones((4, 32), np.float32),
        "sin": np.zeros((4, 32), np.float32),
        "k_pages": np.zeros((3, 16, 2, 64), np.float32),
        "v_pages": np.zeros((3, 16, 2, 64), np.float32),
        "slots": np.arange(4, dtype=np.int32),
        "num_heads": 4,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": np.zeros((4, 7 * 64), np.float32)}, "qkv "),
        ({"qkv": np.zeros((4, 8 * 64), np.int32)}, "qkv has dtype int32"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_heads": 2}, "num_heads=2"),
        ({"cos": np.zeros((4, 64), np.float32)}, "cos "),
        ({"sin": np.zeros((4, 32), np.float16)}, "sin "),
        ({"k_pages": np.zeros((3, 16, 2, 64), np.float16)}, "k_pages has dtype float16"),
        ({"v_pages": np.zeros((3, 16, 2, 64), FP8)}, "v_pages has dtype float8_e4m3fn"),
        ({"v_pages": np.zeros((3, 8, 2, 64), np.float32)}, "v_pages"),
        ({"slots": np.zeros(4, np.int64)}, "slots"),
        ({"first_page": np.zeros(2, np.int32)}, "first_page"),
        ({"q_norm": np.ones(64, np.float32)}, "both or neither"),
        ({"q_norm": np.ones(64, np.float32), "k_norm": np.ones(32, np.float32)}, "k_norm "),
        ({"q_norm": np.ones(64, np.int8), "k_norm": np.ones(64, np.float32)}, "q_norm has dtype"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rope_kv_write(**{**arguments(), **change})


def test_an_odd_head_dim_is_a_mistake():
    odd = {name: np.zeros((3, 16, 2, 5), np.float32) for name in ("k_pages", "v_pages")}
    qkv = {"qkv": np.zeros((4, 8 * 5), np.float32)}
    with pytest.raises(ValueError, match="even head dim"):
        rope_kv_write(**{**arguments(), **odd, **qkv})


@pytest.mark.parametrize("case", ["qwen3-8b", "fp8", "second layer"])
def test_public_function(case):
    """With the default order of this device."""
    case = EDGES[case]
    arrays = case.inputs(5, jnp.bfloat16)
    norms = dict(zip(("q_norm", "k_norm"), arrays[7:], strict=False))  # none in "fp8"
    got = rope_kv_write(*arrays[:6], first_page=arrays[6], **norms, **case.options())
    expected = want(*arrays, **case.options())
    assert_rotated(np.asarray(got[0]), expected[0])
    np.testing.assert_array_equal(bits(np.asarray(got[2])), bits(expected[2]))


# -- on a device ----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
def test_triton_on_device(case):
    check(case, "triton", "bfloat16", seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["qwen3-8b", "head dim 80", "fp8"])
def test_other_dtypes_on_device(case, dtype):
    check(EDGES[case], "triton", dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", cases.LARGE, **by_name)
def test_xla_on_device(case):
    check(case, "xla", "bfloat16", seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("tokens", "heads", "warps"), [(1, 8, 1), (8, 4, 2), (32, 8, 8)])
@pytest.mark.parametrize("case", [cases.LARGE[0], cases.LARGE[4], cases.LARGE[6]], **by_name)
def test_tiles_on_device(case, tokens, heads, warps):
    sizes = {"tokens": tokens, "heads": heads, "num_warps": warps}
    check(case, "triton", "bfloat16", seed=fresh_seed(), **sizes)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize(
    ("name", "pages"), [("triton", "bfloat16"), ("triton", "float8_e4m3fn"), ("xla", "bfloat16")]
)
def test_in_place_on_device(name, pages, tokens):
    in_place(name, jnp.bfloat16, tokens, pages_dtype=jnp.dtype(pages))
