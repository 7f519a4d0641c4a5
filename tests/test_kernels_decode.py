"""paged_decode: every implementation against the float32 reference."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, paged_decode
from pallas_kernels.paged_decode import cases
from pallas_kernels.paged_decode.splits import choose_splits, most_in_cluster
from tests.kernels.support import (
    FP8_TOLERANCE,
    ON_GPU,
    TOLERANCE,
    assert_close,
    decode_shapes,
    faint_keys,
    fresh_seed,
    implementation,
    interprets_mosaic,
    large_queries,
    module,
    nan_keys_are_meant,
    needs_gpu,
    one_key_wins,
    poison,
    quiet,
    reference,
    refuses,
    reuse_passed_pages,
    second_layer,
)
from tests.marks import long, long_but

pytestmark = quiet
EDGES = {case.name: case for case in cases.EDGES}
by_name = {"ids": lambda case: case.name}
want = reference("paged_decode")


@functools.cache
def program(name, interpret, sizes, scale, window, soft_cap):
    """Traced once for all calls of the same shapes."""
    run = implementation("paged_decode", name, interpret=interpret, **dict(sizes))
    return jax.jit(functools.partial(run, scale=scale, window=window, soft_cap=soft_cap))


def check(case, name, dtype, *, seed=0, interpret=False, edit=None, passed=False, **sizes):
    """passed: pages wholly before the windows went to others."""
    arrays = case.inputs(seed, jnp.dtype(dtype))
    if edit is not None:
        arrays = edit(arrays)
    options = tuple(sizes.items()), case.head_dim**-0.5, case.window, case.soft_cap
    call = program(name, interpret, *options)
    if refuses(name, case, dtype):
        with pytest.raises(NotImplementedError):
            call(*arrays)
        return
    given = arrays
    if passed:
        q, *cache, lengths = arrays
        before = np.maximum(np.asarray(lengths) - case.window, 0)
        given = (q, *reuse_passed_pages(*cache, before), lengths)
    placed, first_page = second_layer(given)
    poison(arrays[0].shape, arrays[0].dtype)
    tolerance = FP8_TOLERANCE if case.fp8 and edit is not faint_keys else TOLERANCE
    expected = want(*arrays, **case.options)
    assert_close(call(*placed, first_page=first_page), expected, dtype, tolerance)


def check_locked(case, dtype, *, seed=0, calls=1, interpret=False, **sizes):
    """Triton's single launch, `calls` times over with the same locks and other queries."""
    arrays = case.inputs(seed, jnp.dtype(dtype))
    run = implementation("paged_decode", "triton", interpret=interpret, **sizes)
    call = jax.jit(functools.partial(run, scale=case.head_dim**-0.5, **case.options))
    q, *cache = map(jnp.asarray, arrays)
    locks = jnp.zeros(len(case.lengths) * case.kv_heads + 3, jnp.int32)
    for turn in range(calls):
        poison(q.shape, q.dtype)
        query = q * (1 - 0.5 * turn / calls)
        got, locks = call(query, *cache, locks)
        assert not np.asarray(locks).any(), "a lock is not 0 afterwards"
        if turn in (0, calls - 1):
            tolerance = FP8_TOLERANCE if case.fp8 else TOLERANCE
            assert_close(got, want(query, *arrays[1:], **case.options), dtype, tolerance)


# what others have the parts of
RARE = ("llama-8b", "one head a group", "fp8 head dim 80", "soft cap window")


@pytest.mark.parametrize("dtype", ["float32", long("bfloat16")])
@pytest.mark.parametrize("case", long_but(cases.EDGES, *(EDGES.keys() - RARE)), **by_name)
def test_xla(case, dtype):
    check(case, "xla", dtype)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "name", "dtype", "sizes"),
    [  # cases whose programs other tests have traced
        ("window", "xla", "float32", {}),
        ("window of one", "xla", "float32", {}),
        ("window", "triton", "float32", {"block": 32, "splits": 4}),
        long("soft cap window", "xla", "float32", {}),
        long("window of one", "triton", "bfloat16", {"block": 32, "splits": 1}),
        long("soft cap window", "triton", "float32", {"block": 16, "splits": 2}),
    ],
)
def test_pages_before_the_window_are_not_read(case, name, dtype, sizes):
    check(EDGES[case], name, dtype, interpret=name != "xla", passed=True, **sizes)


@pytest.mark.parametrize("block", [16, long(64), 512])
def test_xla_block_sizes(block):
    case = EDGES["smollm"]
    arrays = case.inputs(1, jnp.float32)
    run = implementation("paged_decode", "xla", interpret=False)
    got = jax.jit(functools.partial(run, scale=0.125, block=block))(*arrays)
    assert_close(got, want(*arrays), "float32")


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "dtype", "splits"),
    [
        long("llama-8b", "bfloat16", 2),
        long("qwen-0.5b", "bfloat16", 4),
        ("smollm", "float32", 4),
        long("smollm", "bfloat16", 1),
        ("group of 8", "float16", 2),
        ("head dim 80", "float32", 2),
        ("page boundaries", "bfloat16", 1),
        long("page boundaries", "bfloat16", 4),
        ("window", "float32", 4),
        long("window of one", "bfloat16", 1),
        long("wide table", "float32", 16),
        long("all empty", "float32", 2),
        ("all empty", "bfloat16", 1),
        ("soft cap", "float32", 2),
        long("soft cap window", "bfloat16", 4),
        ("fp8", "bfloat16", 2),
        long("fp8 head dim 80", "float16", 1),
    ],
)
def test_triton_interpreted(case, dtype, splits):
    check(EDGES[case], "triton", dtype, interpret=True, block=32, splits=splits)


def huge_queries(arrays):
    rows = np.flatnonzero(arrays[-1])
    return one_key_wins(arrays, rows, [(row, arrays[-1][row] // 2) for row in rows])


EXTREMES = pytest.mark.parametrize("edit", [large_queries, huge_queries, faint_keys])


@EXTREMES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_numbers_on_fp8_pages_in_xla(dtype, edit):
    check(EDGES["fp8"], "xla", dtype, edit=edit)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@EXTREMES
@pytest.mark.parametrize("splits", [long(1), 2])
def test_extreme_numbers_on_fp8_pages_interpreted(splits, edit):
    check(EDGES["fp8"], "triton", "bfloat16", interpret=True, edit=edit, block=32, splits=splits)


@pytest.mark.gpu
@needs_gpu
@EXTREMES
def test_extreme_numbers_on_fp8_pages_on_device(edit):
    check(EDGES["fp8"], "triton", "bfloat16", edit=edit)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "dtype", "splits"),
    [
        long("llama-8b", "bfloat16", 2),
        ("smollm", "float32", 4),
        ("qwen-0.5b", "bfloat16", 1),
        long("head dim 80", "float32", 2),
        long("window", "float32", 4),
        long("wide table", "float32", 16),
        long("all empty", "float32", 2),
        ("fp8", "bfloat16", 2),
    ],
)
def test_triton_with_locks_interpreted(case, dtype, splits):
    check_locked(EDGES[case], dtype, calls=2, interpret=True, block=16, splits=splits)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
def test_triton_with_locks_merges_in_several_rounds(monkeypatch):
    home = module("paged_decode", "triton")
    monkeypatch.setattr(home, "MERGED_AT_ONCE", 2 * 4 * 64)  # two splits of four heads at once
    case = cases.Case("many splits", 4, 1, 64, 16, (100, 7, 16, 128))
    check_locked(case, "float32", interpret=True, block=16, splits=8)


def test_locks_come_back_from_the_public_function():
    case = EDGES["smollm"]
    arrays = tuple(map(jnp.asarray, case.inputs(3, jnp.float32)))
    locks = jnp.zeros(len(case.lengths) * case.kv_heads, jnp.int32)
    got, locks = paged_decode(*arrays, locks)
    np.testing.assert_array_equal(got, paged_decode(*arrays))
    assert not np.asarray(locks).any()


@pytest.mark.parametrize("name", [long("xla"), "triton", long("mosaic_sm90"), "mosaic_cluster"])
def test_locks_lower_and_come_back(name):
    shapes = decode_shapes(4, 4, (64, 64, 2, 64), 32, locks=8)
    run = functools.partial(implementation("paged_decode", name, interpret=False), scale=0.1)
    out, locks = jax.eval_shape(run, *shapes)
    assert out.shape == (4, 4, 64) and (locks.shape, locks.dtype) == ((8,), jnp.int32)
    text = compat.lower_for_cuda(run, *shapes)
    assert ("output_operand_aliases" in text) == (name == "triton")


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@interprets_mosaic
@nan_keys_are_meant
@pytest.mark.parametrize(
    ("case", "dtype", "splits", "block"),
    [
        long("one head a group", "bfloat16", 1, 64),
        long("smollm", "bfloat16", 2, 64),
        ("group of 8", "float16", 1, 64),
        ("page boundaries", "bfloat16", 2, 64),
        long("window", "bfloat16", 2, 64),
        long("all empty", "bfloat16", 2, 64),
        ("soft cap window", "bfloat16", 2, 64),
        ("fp8", "bfloat16", 1, 64),
        ("head dim 80", "bfloat16", 1, 64),
        ("smollm", "float32", 1, 64),
    ],
)
def test_mosaic_interpreted(case, dtype, splits, block):
    check(EDGES[case], "mosaic_sm90", dtype, interpret=True, splits=splits, block=block)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@interprets_mosaic
@nan_keys_are_meant
@pytest.mark.parametrize(
    ("case", "dtype", "splits", "stages"),
    [
        long("one head a group", "bfloat16", 2, 4),
        long("qwen-0.5b", "bfloat16", 8, 2),
        long("group of 8", "float16", 2, 2),
        long("page boundaries", "bfloat16", 2, 2),
        long("long", "bfloat16", 2, 1),
        ("long window", "bfloat16", 2, 1),
        long("wide table", "bfloat16", 4, 2),
        long("all empty", "bfloat16", 4, 2),
        ("soft cap window", "bfloat16", 4, 1),
        ("fp8", "bfloat16", 2, 2),
        ("head dim 80", "bfloat16", 2, 2),
        ("smollm", "float32", 2, 2),
    ],
)
def test_mosaic_cluster_interpreted(case, dtype, splits, stages):
    """All but the exchange between the blocks, which the interpreter lacks. Blocks of the long
    rows refill their ring."""
    refilled = {
        "long": cases.Case("long", 4, 2, 64, 32, (330, 100)),
        "long window": cases.Case("long window", 7, 1, 64, 64, (500, 70), window=400),
    }
    case = refilled.get(case) or EDGES[case]
    check(case, "mosaic_cluster", dtype, interpret=True, splits=splits, stages=stages)


MODELS = {
    "llama-3.1-8b": (32, 8, 128, 64),
    "qwen2.5-0.5b": (14, 2, 64, 64),
    "smollm": (9, 3, 64, 16),
}


LOWERED = (
    ("triton", "llama-3.1-8b", 1, None),
    ("triton", "smollm", 64, 1024),
    ("mosaic_sm90", "qwen2.5-0.5b", 64, None),
    ("mosaic_sm90", "llama-3.1-8b", 1, 1024),
    ("xla", "smollm", 1, 1024),
)


@pytest.mark.parametrize(
    ("name", "model", "batch", "window"),
    [
        *LOWERED,
        *(
            long(*case)
            for name, model in itertools.product(("triton", "mosaic_sm90", "xla"), MODELS)
            for case in ((name, model, 1, 1024), (name, model, 64, None))
            if case not in LOWERED
        ),
    ],
)
def test_lowers_for_cuda(name, model, batch, window):
    heads, kv_heads, head_dim, page_size = MODELS[model]
    shapes = decode_shapes(batch, heads, (4096, page_size, kv_heads, head_dim), 128)
    run = implementation("paged_decode", name, interpret=False)
    text = compat.lower_for_cuda(functools.partial(run, scale=0.1, window=window), *shapes)
    assert (name == "xla") != ("custom_call" in text)


@pytest.mark.parametrize(
    ("model", "batch", "block", "window"),
    [
        ("llama-3.1-8b", 1, 64, None),
        ("qwen2.5-0.5b", 1, 128, 1024),
        ("smollm", 8, 64, None),
        long("llama-3.1-8b", 8, 64, 1024),
        long("llama-3.1-8b", 1, 128, None),
        long("qwen2.5-0.5b", 8, 64, None),
        long("qwen2.5-0.5b", 1, 64, None),
        long("smollm", 1, 128, None),
        long("smollm", 1, 64, 1024),
    ],
)
def test_clusters_lower_for_cuda(model, batch, block, window):
    heads, kv_heads, head_dim, page_size = MODELS[model]
    shapes = decode_shapes(batch, heads, (4096, page_size, kv_heads, head_dim), 512)
    sizes = {"block": block, "stages": 2, "splits": 4}
    run = implementation("paged_decode", "mosaic_cluster", interpret=False, **sizes)
    text = compat.lower_for_cuda(functools.partial(run, scale=0.1, window=window), *shapes)
    assert "custom_call" in text and "pad" not in text, "one kernel, and q as it is"


@pytest.mark.parametrize(
    ("batch", "heads", "width", "message"),
    [
        (64, 4, 64, "128 programs of at most 64 tiles"),
        (4, 4, 1, "8 programs of at most 1 tiles"),
        (1, 4, 64, "2 clusters of 8 blocks leave most of 132"),
        (1, 18, 64, "9 query heads"),
    ],
)
def test_clusters_refuse_what_needs_no_splits(batch, heads, width, message):
    shapes = decode_shapes(batch, heads, (64, 64, 2, 64), width)
    run = implementation("paged_decode", "mosaic_cluster", interpret=False)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(run, scale=0.1), *shapes)


def test_float32_lowers_for_cuda_in_triton_only():
    shapes = decode_shapes(4, 9, (64, 16, 3, 64), 8, dtype=jnp.float32)
    triton = implementation("paged_decode", "triton", interpret=False)
    assert "custom_call" in compat.lower_for_cuda(functools.partial(triton, scale=0.1), *shapes)
    mosaic = implementation("paged_decode", "mosaic_sm90", interpret=False)
    with pytest.raises(NotImplementedError, match="float32"):
        compat.lower_for_cuda(functools.partial(mosaic, scale=0.1), *shapes)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_cap_and_fp8_lower_for_cuda(model, locked):
    heads, kv_heads, head_dim, page_size = MODELS[model]
    pages, locks = (4096, page_size, kv_heads, head_dim), 64 if locked else 0
    shapes = decode_shapes(4, heads, pages, 128, kv_dtype=jnp.float8_e4m3fn, locks=locks)
    triton = implementation("paged_decode", "triton", interpret=False)
    run = functools.partial(triton, scale=0.1, window=300, soft_cap=30.0)
    assert "custom_call" in compat.lower_for_cuda(run, *shapes)
    mosaic = implementation("paged_decode", "mosaic_sm90", interpret=False)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        compat.lower_for_cuda(functools.partial(mosaic, scale=0.1), *shapes)


def test_fp8_pages_between_2_and_4_gib_are_refused_by_triton():
    shapes = decode_shapes(1, 16, (1 << 14, 64, 16, 128), 8, kv_dtype=jnp.float8_e4m3fn)
    triton = implementation("paged_decode", "triton", interpret=False)
    with pytest.raises(NotImplementedError, match="offsets wrap"):
        jax.eval_shape(functools.partial(triton, scale=0.1), *shapes)


def test_splits_fill_the_device_and_respect_the_table():
    assert choose_splits(programs=8, tiles=128, cores=132) == 32
    assert choose_splits(programs=64, tiles=128, cores=132) == 4
    assert choose_splits(programs=512, tiles=128, cores=132) == 1
    assert choose_splits(programs=8, tiles=3, cores=132) == 2
    assert choose_splits(programs=1, tiles=1, cores=0) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 5, 64), np.float32)}, "q "),
        ({"q": np.zeros((2, 4, 64), np.float16)}, "q has dtype float16"),
        ({"lengths": np.zeros(3, np.int32)}, "lengths"),
        ({"page_table": np.zeros((2, 4), np.int16)}, "page_table"),
        ({"v_pages": np.zeros((3, 8, 2, 64), np.float32)}, "v_pages"),
        ({"window": 0}, "window=0"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0"),
        ({"locks": np.zeros(3, np.int32)}, r"locks is int32\[3\]: expected int32\[at least 4\]"),
        ({"locks": np.zeros(4, np.float32)}, "locks"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "q": np.zeros((2, 4, 64), np.float32),
        "k_pages": np.zeros((3, 16, 2, 64), np.float32),
        "v_pages": np.zeros((3, 16, 2, 64), np.float32),
        "page_table": np.zeros((2, 4), np.int32),
        "lengths": np.zeros(2, np.int32),
    }
    with pytest.raises(ValueError, match=message):
        paged_decode(**{**arguments, **change})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
@pytest.mark.parametrize("name", ["triton", "mosaic_sm90", "xla"])
def test_on_device(name, case):
    # fresh inputs every run: a result left in memory by another run cannot pass for this one's
    check(case, name, "bfloat16", seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["smollm", "window", "head dim 80"])
@pytest.mark.parametrize("name", ["triton", "mosaic_sm90", "xla"])
def test_other_dtypes_on_device(name, case, dtype):
    check(EDGES[case], name, dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
def test_locks_on_device(case):
    check_locked(case, "bfloat16", calls=20, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("splits", [2, 16, 64])
def test_locks_with_many_splits_on_device(splits):
    case = cases.Case("ragged", 32, 8, 128, 64, (4000, 1, 0, 513, 64, 2047), width=128)
    check_locked(case, "bfloat16", calls=50, seed=fresh_seed(), splits=splits)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("splits", [2, 4, 8, 16])
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
def test_clusters_on_device(case, splits):
    splits = min(splits, most_in_cluster(case.head_dim))
    check(case, "mosaic_cluster", "bfloat16", seed=fresh_seed(), splits=splits)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", [(64, 1), (64, 4), (128, 2), (128, 1)])
def test_sizes_of_clusters_on_device(sizes):
    block, stages = sizes
    case = cases.Case("ragged", 14, 2, 64, 64, (4000, 1, 0, 513, 64, 2047), width=128)
    sized = {"block": block, "stages": stages, "splits": 8}
    check(case, "mosaic_cluster", "float16", seed=fresh_seed(), **sized)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_clusters_repeat_themselves_on_device(head_dim):
    """The blocks' shares merge in one order, however they arrive: a share that was read before it
    arrived, or a block that left too early, shows as another result."""
    case = cases.Case("ragged", 32, 8, head_dim, 64, (1024, 70, 0, 3001), width=64)
    arrays = [jnp.asarray(x) for x in case.inputs(fresh_seed(), jnp.bfloat16)]
    run = implementation("paged_decode", "mosaic_cluster", interpret=False, splits=8)
    call = jax.jit(functools.partial(run, scale=head_dim**-0.5))
    first = call(*arrays)
    assert_close(first, want(*map(np.asarray, arrays)), "bfloat16", TOLERANCE)
    differing = sum((call(*arrays) != first).sum() for _ in range(300))
    assert int(differing) == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", cases.LARGE, **by_name)
def test_default_order_on_device(case):
    arrays = case.inputs(7, jnp.bfloat16)
    got = jax.jit(functools.partial(paged_decode, **case.options))(*arrays)
    tolerance = FP8_TOLERANCE if case.fp8 else TOLERANCE
    assert_close(got, want(*arrays, **case.options), "bfloat16", tolerance)
