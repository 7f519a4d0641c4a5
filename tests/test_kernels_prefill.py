"""paged_prefill: every implementation against the float32 reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, paged_prefill
from pallas_kernels.device import Device
from pallas_kernels.paged_features import paged_features
from pallas_kernels.paged_prefill import cases
from pallas_kernels.paged_prefill.plan import plan_tiles, plan_work
from tests.kernels.support import (
    FP8_TOLERANCE,
    ON_GPU,
    TOLERANCE,
    assert_close,
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
    shape_list,
)
from tests.marks import long, long_but

pytestmark = quiet
EDGES = {case.name: case for case in cases.EDGES}
LARGE = {case.name: case for case in cases.LARGE}
by_name = {"ids": lambda case: case.name}
want = reference("paged_prefill")
TRITON = {"rows": 32, "block": 32}
"""Of interpreted kernels: cases have several tiles of both."""


@functools.cache
def program(name, interpret, sizes, scale, window, soft_cap):
    """Traced once for all calls of the same shapes."""
    run = implementation("paged_prefill", name, interpret=interpret, **dict(sizes))
    return jax.jit(functools.partial(run, scale=scale, window=window, soft_cap=soft_cap))


def check(case, name, dtype, *, seed=0, interpret=False, edit=None, passed=False, **sizes):
    """passed: pages wholly before the windows went to others."""
    arrays = case.inputs(seed, jnp.dtype(dtype))
    if edit is not None:
        arrays = edit(arrays)
    options = tuple(sizes.items()), case.head_dim**-0.5, case.window, case.soft_cap
    call = program(name, interpret, *options)
    if refuses(name, case, dtype, head_dims=(64, 96, 128, 256)):
        with pytest.raises(NotImplementedError):
            call(*arrays)
        return
    given = arrays
    if passed:
        q, *cache, starts, lens, prefixes = arrays
        before = np.maximum(np.asarray(prefixes) - case.window + 1, 0)
        given = (q, *reuse_passed_pages(*cache, before), starts, lens, prefixes)
    placed, first_page = second_layer(given)
    poison(arrays[0].shape, arrays[0].dtype)
    live = case.live()
    reach = case.reach()
    got = np.asarray(call(*placed, first_page=first_page, reach=reach))[live]
    tolerance = FP8_TOLERANCE if case.fp8 and edit is not faint_keys else TOLERANCE
    assert_close(got, want(*arrays, reach=reach, **case.options)[live], dtype, tolerance)


# what others have the parts of
RARE = (
    "llama-8b", "one head a group", "two warpgroups", "window of one", "many short",
    "soft cap window", "blocks cap", "blocks fp8", "head dim 96", "head dim 256",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", long("bfloat16")])
@pytest.mark.parametrize("case", long_but(cases.EDGES, *(EDGES.keys() - RARE)), **by_name)
def test_xla(case, dtype):
    check(case, "xla", dtype)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "name", "dtype"),
    [  # cases whose programs other tests have traced
        ("window", "xla", "float32"),
        ("window edges", "xla", "float32"),
        ("window edges", "triton", "float32"),
        long("window of one", "xla", "float32"),
        long("soft cap window", "xla", "float32"),
        long("window", "triton", "float32"),
        long("window of one", "triton", "bfloat16"),
        long("soft cap window", "triton", "float32"),
    ],
)
def test_pages_before_the_window_are_not_read(case, name, dtype):
    sizes = {} if name == "xla" else TRITON
    check(EDGES[case], name, dtype, interpret=name != "xla", passed=True, **sizes)


@pytest.mark.parametrize(("tile", "block"), [(8, 16), long(16, 64), (256, 256)])
def test_xla_block_sizes(tile, block):
    case = EDGES["smollm mixed"]
    arrays = case.inputs(1, jnp.float32)
    run = implementation("paged_prefill", "xla", interpret=False)
    got = jax.jit(functools.partial(run, scale=0.125, tile=tile, block=block))(*arrays)
    live = case.live()
    assert_close(np.asarray(got)[live], want(*arrays)[live], "float32")


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("smollm mixed", "float32"),
        ("group of 8", "float16"),
        ("head dim 80", "float32"),
        ("page boundaries", "bfloat16"),
        ("window edges", "float32"),
        ("nothing to do", "bfloat16"),
        ("soft cap", "float32"),
        ("fp8", "bfloat16"),
        ("blocks window", "float32"),
        long("llama-8b", "bfloat16"),
        long("qwen-0.5b", "bfloat16"),
        long("smollm mixed", "bfloat16"),
        long("window", "float32"),
        long("window of one", "bfloat16"),
        long("causal edges", "bfloat16"),
        long("head dim 96", "bfloat16"),
        long("head dim 256", "bfloat16"),
        long("blocks", "bfloat16"),
        long("blocks", "float32"),
        long("blocks cap", "float16"),
        long("blocks fp8", "bfloat16"),
    ],
)
def test_triton_interpreted(case, dtype):
    check(EDGES[case], "triton", dtype, interpret=True, **TRITON)


def huge_queries(arrays):
    """A query fits the key of its own token."""
    places = [
        (start + i, (sequence, prefix + i))
        for sequence, (start, count, prefix) in enumerate(zip(*arrays[-3:], strict=True))
        for i in range(count)
    ]
    return one_key_wins(arrays, *zip(*places, strict=True))


EXTREMES = pytest.mark.parametrize("edit", [large_queries, huge_queries, faint_keys])


@EXTREMES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_numbers_on_fp8_pages_in_xla(dtype, edit):
    check(EDGES["fp8"], "xla", dtype, edit=edit)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@EXTREMES
def test_extreme_numbers_on_fp8_pages_interpreted(edit):
    check(EDGES["fp8"], "triton", "bfloat16", interpret=True, edit=edit, **TRITON)


@pytest.mark.gpu
@needs_gpu
@EXTREMES
def test_extreme_numbers_on_fp8_pages_on_device(edit):
    check(EDGES["fp8"], "triton", "bfloat16", edit=edit)


# those of two cases, and one without new tokens between them
TOGETHER = cases.Case(
    "edges and two warpgroups", 2, 1, 64, 16, (130, 0, 70, 9, 3, 4, 1, 5),
    (0, 5, 5, 30, 31, 62, 63, 61), tail=8,
)  # fmt: skip
WITH_TOGETHER = {**EDGES, TOGETHER.name: TOGETHER}


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@interprets_mosaic
@nan_keys_are_meant
@pytest.mark.parametrize(
    ("case", "dtype", "sizes"),
    [
        ("edges and two warpgroups", "bfloat16", {"block": 64, "turns": 0, "programs": 2}),
        ("group of 8", "float16", {"programs": 1}),
        ("window edges", "bfloat16", {"block": 64, "stages": 3, "packed": 1, "programs": 1}),
        ("head dim 256", "bfloat16", {"block": 64, "queries": 1, "programs": 1}),
        long("nothing to do", "bfloat16", {}),
        long("smollm mixed", "bfloat16", {"block": 64, "stages": 4, "packed": 3, "programs": 3}),
        long("page boundaries", "bfloat16", {"packed": 1, "turns": 0, "programs": 2}),
        long("qwen-0.5b", "bfloat16", {"packed": 7, "programs": 2}),
        long("many short", "bfloat16", {"block": 64, "stages": 3, "turns": 0, "programs": 3}),
        long("soft cap window", "bfloat16", {"block": 64, "programs": 2}),
        long("blocks", "bfloat16", {"block": 64, "packed": 1, "turns": 0, "programs": 3}),
        long("blocks window", "bfloat16", {"block": 64, "packed": 3, "programs": 2}),
        long("blocks cap", "bfloat16", {"programs": 1}),
        long("head dim 96", "bfloat16", {"block": 64, "packed": 1, "programs": 2}),
        long("head dim 256", "bfloat16", {"block": 64, "queries": 1, "turns": 0, "programs": 3}),
        ("head dim 80", "bfloat16", {}),
        ("smollm mixed", "float32", {}),
        ("fp8", "bfloat16", {}),
    ],
)
def test_mosaic_interpreted(case, dtype, sizes):
    check(WITH_TOGETHER[case], "mosaic_sm90", dtype, interpret=True, **sizes)


def test_mosaic_refuses_sizes_that_do_not_fit():
    case = EDGES["qwen-0.5b"]
    arrays = case.inputs(0, jnp.bfloat16)
    for sizes in ({"packed": 2}, {"stages": 1}, {"block": 32}, {"stages": 9}, {"queries": 12}):
        run = implementation("paged_prefill", "mosaic_sm90", interpret=False, **sizes)
        with pytest.raises(NotImplementedError):
            run(*map(jnp.asarray, arrays), scale=0.1)


planned = jax.jit(plan_work, static_argnums=3, static_argnames=("tile", "block", "window"))


def test_work_is_every_tile_heaviest_first():
    rng = np.random.default_rng(0)
    for window in (None, 40):
        starts, lens, prefixes = (rng.integers(0, 90, 5).astype(np.int32) for _ in range(3))
        total = int(lens.sum())
        work, used = planned(starts, lens, prefixes, total, tile=16, block=32, window=window)
        work = np.asarray(work)[: int(used[0])]
        tiles = [(s, o) for s in range(5) for o in range(0, lens[s], 16)]
        found = [(int(s), int(p - prefixes[s])) for _, _, p, s in work]
        assert sorted(found) == tiles
        rows, left, position, sequence = work.T
        np.testing.assert_array_equal(rows - starts[sequence], position - prefixes[sequence])
        np.testing.assert_array_equal(left, lens[sequence] - (position - prefixes[sequence]))
        first = np.maximum(position - (window - 1), 0) // 32 if window else 0
        blocks = -(-(position + np.minimum(left, 16)) // 32) - first
        assert (np.diff(blocks) <= 0).all()


@pytest.mark.parametrize(("head_dim", "sizes"), [(128, (128, 64, 4, 3)), (256, (64, 32, 8, 3))])
def test_wide_heads_do_not_take_sizes_measured_with_others(head_dim, sizes):
    hopper = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
    q = jax.ShapeDtypeStruct((512, 8, head_dim), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((64, 64, 4, head_dim), jnp.bfloat16)
    features = {"tokens": 512, **paged_features(q, pages)}
    found = module("paged_prefill", "triton").default_sizes(hopper, features)
    assert dataclasses.astuple(found) == sizes


def test_work_of_blocks_knows_their_ends():
    case = cases.Case("", 1, 1, 64, 16, (70, 0, 20), (5, 9, 40), blocks=((0, 10, 45), (2, 0, 9)))
    starts, lens, prefixes = case.inputs(0, np.float32)[-3:]
    reach = case.reach()
    work, used = planned(starts, lens, prefixes, 96, tile=16, block=8, window=None, reach=reach)
    work = np.asarray(work)[: int(used[0])]
    for row, left, _, _, least, greatest in work:
        of_tile = reach[row : row + min(left, 16)]
        assert (least, greatest) == (of_tile.min(), of_tile.max())
    assert len(work) == 7
    assert (np.diff(work[:, 5] // 8) <= 0).all()


def test_plan_covers_every_token_once():
    rng = np.random.default_rng(0)
    tiles_of = jax.jit(plan_tiles, static_argnums=(1, 2))
    for _ in range(20):
        # any number of tokens, of few sizes that are compiled
        lens = rng.integers(0, 50, 5).astype(np.int32)
        sequence, offset = map(np.asarray, tiles_of(lens, -(-int(lens.sum()) // 100) * 100, 16))
        used = [(s, o) for s, o in zip(sequence, offset, strict=True) if s >= 0]
        assert used == [(s, o) for s in range(5) for o in range(0, lens[s], 16)]
        assert (sequence[len(used) :] == -1).all()


MOSAIC_SIZES = [
    {"block": block, "stages": stages, "turns": turns}
    for block, stages in ((64, 4), (128, 2))
    for turns in (0, 1)
]
MODELS = {
    "llama-3.1-8b": (32, 8, 128, 64),
    "qwen2.5-0.5b": (14, 2, 64, 64),
    "smollm": (9, 3, 64, 16),
}
OTHER_HEADS = {
    "phi-3-mini": (32, 32, 96, 64),
    "gemma-3-4b": (8, 4, 256, 64),
    "gemma-2-9b": (16, 8, 256, 16),
}


LOWERED = (
    ("triton", "llama-3.1-8b", 2048, None),
    ("triton", "smollm", 64, 1024),
    ("mosaic_sm90", "smollm", 2048, None),
    ("mosaic_sm90", "qwen2.5-0.5b", 64, 1024),
    ("xla", "qwen2.5-0.5b", 64, 1024),
)
"""The first of `make test`, then every model with both numbers of tokens, both windows."""


@pytest.mark.parametrize(
    ("name", "model", "tokens", "window"),
    [
        *LOWERED,
        *(
            long(name, model, *sizes)
            for name in ("triton", "mosaic_sm90", "xla")
            for model in MODELS
            for sizes in ((2048, None), (64, 1024))
            if (name, model, *sizes) not in LOWERED
        ),
    ],
)
def test_lowers_for_cuda(name, model, tokens, window):
    heads, kv_heads, head_dim, page_size = MODELS[model]
    pages = ((4096, page_size, kv_heads, head_dim), jnp.bfloat16)
    row = ((16,), jnp.int32)
    shapes = shape_list(
        [((tokens, heads, head_dim), jnp.bfloat16), pages, pages,
         ((16, 128), jnp.int32), row, row, row]
    )  # fmt: skip
    run = implementation("paged_prefill", name, interpret=False)
    text = compat.lower_for_cuda(functools.partial(run, scale=0.1, window=window), *shapes)
    assert (name == "xla") != ("custom_call" in text)


def test_float32_lowers_for_cuda_in_triton_only():
    pages, row = ((64, 16, 3, 64), jnp.float32), ((4,), jnp.int32)
    shapes = shape_list(
        [((64, 9, 64), jnp.float32), pages, pages, ((4, 8), jnp.int32), row, row, row]
    )
    triton = implementation("paged_prefill", "triton", interpret=False)
    assert "custom_call" in compat.lower_for_cuda(functools.partial(triton, scale=0.1), *shapes)
    mosaic = implementation("paged_prefill", "mosaic_sm90", interpret=False)
    with pytest.raises(NotImplementedError, match="float32"):
        compat.lower_for_cuda(functools.partial(mosaic, scale=0.1), *shapes)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("triton", "qwen2.5-0.5b"),
        long("mosaic_sm90", "llama-3.1-8b"),
        long("triton", "smollm"),
        long("mosaic_sm90", "qwen2.5-0.5b"),
    ],
)
def test_fixed_tiles_lower_for_cuda(name, model):
    heads, kv_heads, head_dim, page_size = MODELS[model]
    pages, row = ((4096, page_size, kv_heads, head_dim), jnp.bfloat16), ((16,), jnp.int32)
    shapes = shape_list(
        [((1024, heads, head_dim), jnp.bfloat16), pages, pages, ((16, 128), jnp.int32), row, row,
         row]
    )  # fmt: skip
    run = implementation("paged_prefill", name, interpret=False)
    run = functools.partial(run, scale=0.1, window=1024, fixed_tiles=True)
    assert "custom_call" in compat.lower_for_cuda(run, *shapes)


@pytest.mark.parametrize("model", long_but(MODELS, "smollm"))
def test_cap_and_fp8_lower_for_cuda(model):
    heads, kv_heads, head_dim, page_size = MODELS[model]
    q, row = ((256, heads, head_dim), jnp.bfloat16), ((16,), jnp.int32)
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        pages = ((4096, page_size, kv_heads, head_dim), dtype)
        shapes = shape_list([q, pages, pages, ((16, 128), jnp.int32), row, row, row])
        for name in ("triton", "mosaic_sm90"):
            run = implementation("paged_prefill", name, interpret=False)
            run = functools.partial(run, scale=0.1, window=300, soft_cap=30.0)
            if (name, dtype) == ("mosaic_sm90", jnp.float8_e4m3fn):
                with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
                    compat.lower_for_cuda(run, *shapes)
            else:
                assert "custom_call" in compat.lower_for_cuda(run, *shapes)


def reach_shapes(heads, kv_heads, head_dim, page_size):
    """Arguments of an implementation up to the last one, reach."""
    pages = ((4096, page_size, kv_heads, head_dim), jnp.bfloat16)
    ints = [(shape, jnp.int32) for shape in ((16, 128), (16,), (16,), (16,), (1,), (512,))]
    return shape_list([((512, heads, head_dim), jnp.bfloat16), pages, pages, *ints])


@pytest.mark.parametrize(
    ("name", "model", "window"),
    [
        ("triton", "smollm", 100),
        long("mosaic_sm90", "llama-3.1-8b", 100),
        ("xla", "qwen2.5-0.5b", None),
        long("triton", "llama-3.1-8b", None),
        long("mosaic_sm90", "llama-3.1-8b", None),
        long("mosaic_sm90", "qwen2.5-0.5b", None),
    ],
)
def test_reach_lowers_for_cuda(name, model, window):
    """With one operand more, of the tokens or of the tiles' rows; without, nothing of it."""
    shapes = reach_shapes(*MODELS[model])
    run = implementation("paged_prefill", name, interpret=False)
    run = functools.partial(run, scale=0.1, window=window)
    texts = [compat.lower_for_cuda(run, *arguments) for arguments in (shapes[:-1], shapes)]
    operands = {"triton": 10, "mosaic_sm90": 7, "xla": None}[name]
    for more, text in enumerate(texts):
        calls = re.findall(r"custom_call @[^(]+\(([^)]*)\)", text)
        assert [1 + call.count(",") for call in calls] == ([operands + more] if operands else [])
    assert ("tensor<512xi32>" in texts[0], "tensor<512xi32>" in texts[1]) == (False, True)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mosaic_sm90", "phi-3-mini"),
        long("mosaic_sm90", "gemma-3-4b"),
        long("mosaic_sm90", "gemma-2-9b"),
        *(long("triton", model) for model in OTHER_HEADS),
    ],
)
def test_other_head_dims_lower_for_cuda(name, model):
    shapes = reach_shapes(*OTHER_HEADS[model])
    run = implementation("paged_prefill", name, interpret=False)
    run = functools.partial(run, scale=0.1, window=300, soft_cap=50.0)
    assert "custom_call" in compat.lower_for_cuda(run, *shapes)


@pytest.mark.parametrize("sizes", [MOSAIC_SIZES[0], *map(long, MOSAIC_SIZES[1:])], ids=str)
def test_every_mosaic_schedule_lowers_for_cuda(sizes):
    q, pages, row = ((512, 32, 128), jnp.bfloat16), ((64, 64, 8, 128), jnp.bfloat16), (4,)
    row = (row, jnp.int32)
    shapes = shape_list([q, pages, pages, ((4, 16), jnp.int32), row, row, row])
    run = implementation("paged_prefill", "mosaic_sm90", interpret=False, **sizes)
    assert "custom_call" in compat.lower_for_cuda(functools.partial(run, scale=0.1), *shapes)


F8_PAGES = np.zeros((3, 16, 2, 64), jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((17, 4, 64), np.float32)}, "multiple of 8"),
        ({"q_lens": np.zeros(3, np.int32)}, "q_lens"),
        ({"prefix_lens": np.zeros(2, np.float32)}, "prefix_lens"),
        ({"window": -1}, "window=-1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"reach": np.zeros(2, np.int32)}, r"reach is int32\[2\]: expected int32\[16\]"),
        ({"k_pages": F8_PAGES}, "v_pages has dtype float32"),
        ({"k_pages": F8_PAGES}, "v_pages has dtype float32"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "q": np.zeros((16, 4, 64), np.float32),
        "k_pages": np.zeros((3, 16, 2, 64), np.float32),
        "v_pages": np.zeros((3, 16, 2, 64), np.float32),
        "page_table": np.zeros((2, 4), np.int32),
        **{name: np.zeros(2, np.int32) for name in ("q_starts", "q_lens", "prefix_lens")},
    }
    with pytest.raises(ValueError, match=message):
        paged_prefill(**{**arguments, **change})


BLOCKS = (range(10, 100), range(130, 256), range(256, 300), range(384, 430))


def check_cuts(
    name, dtype, group, window, blocks=(), *, length=430, kv_heads=2, cuts=None, interpret=False
):
    """A sequence of `length` tokens whole, and cut in different ways, behind another sequence:
    every token is bitwise the same. blocks: of tokens that see each other."""
    page_size, head_dim, tokens = 64, 64, -(-(length + 40) // 128) * 128
    keys = jax.random.split(jax.random.key(group), 3)
    pages = (24, page_size, kv_heads, head_dim)
    k_pages, v_pages = (jax.random.normal(key, pages, jnp.dtype(dtype)) for key in keys[:2])
    q = np.asarray(jax.random.normal(keys[2], (length, kv_heads * group, head_dim), k_pages.dtype))
    table = np.stack([np.arange(8), np.arange(8, 16)]).astype(np.int32)
    ends = np.arange(length, dtype=np.int32)
    for block in blocks:
        ends[block] = block.stop - 1
    run = implementation("paged_prefill", name, interpret=interpret)
    call = jax.jit(functools.partial(run, scale=0.125, window=window, fixed_tiles=True))

    def attend(start, stop, beside):
        """The tokens start..stop-1 behind `beside` tokens of another sequence."""
        packed = np.zeros((tokens, *q.shape[1:]), q.dtype)
        packed[:beside] = q[::-1][:beside]
        packed[beside : beside + stop - start] = q[start:stop]
        starts, lens, prefixes = (
            np.array(x, np.int32) for x in ([0, beside], [beside, stop - start], [7, start])
        )
        reach = None
        if blocks:
            reach = np.full(tokens, -1, np.int32)
            reach[:beside] = 7 + np.arange(beside)
            reach[beside : beside + stop - start] = ends[start:stop]
        out = call(packed, k_pages, v_pages, table, starts, lens, prefixes, reach=reach)
        return np.asarray(out)[beside : beside + stop - start]

    whole = attend(0, length, 0)
    for cut in cuts or ((128,), (256,), (128, 384)):
        edges = (0, *cut, length)
        parts = [attend(a, b, 40) for a, b in itertools.pairwise(edges)]
        assert np.concatenate(parts).tobytes() == whole.tobytes(), cut


CUTS = pytest.mark.parametrize(("group", "window"), [(2, None), (3, None), (7, 100), (1, 200)])


@pytest.mark.parametrize(
    ("group", "window", "blocks"),
    [
        (7, 100, ()),
        *(long(*x) for x in ((3, None, ()), (2, None, ()), (1, 200, ()))),
        long(2, 100, BLOCKS),
    ],
)
def test_cuts_at_fixed_tiles_change_no_bit(group, window, blocks):
    check_cuts("xla", "float32", group, window, blocks)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    ("group", "window", "blocks"), [(3, None, ()), long(7, 100, ()), long(2, 100, BLOCKS)]
)
def test_cuts_at_fixed_tiles_change_no_bit_in_triton_interpreted(group, window, blocks):
    check_cuts("triton", "float32", group, window, blocks, cuts=[(128, 384)], interpret=True)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@interprets_mosaic
@nan_keys_are_meant
@pytest.mark.long
def test_cuts_at_fixed_tiles_change_no_bit_in_mosaic_interpreted():
    sizes = {"length": 170, "kv_heads": 1, "cuts": [(128,)]}
    check_cuts("mosaic_sm90", "bfloat16", 2, 100, **sizes, interpret=True)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@interprets_mosaic
@nan_keys_are_meant
@pytest.mark.long
def test_cuts_between_blocks_change_no_bit_in_mosaic_interpreted():
    sizes = {"length": 270, "kv_heads": 1, "cuts": [(128,)]}
    check_cuts("mosaic_sm90", "bfloat16", 2, 100, BLOCKS[:2], **sizes, interpret=True)


@pytest.mark.gpu
@needs_gpu
@CUTS
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mosaic_sm90", "bfloat16"), ("triton", "bfloat16"), ("triton", "float32")],
)
@pytest.mark.parametrize("blocks", [(), BLOCKS])
def test_cuts_at_fixed_tiles_change_no_bit_on_device(name, dtype, group, window, blocks):
    check_cuts(name, dtype, group, window, blocks)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
@pytest.mark.parametrize("name", ["mosaic_sm90", "triton", "xla"])
def test_on_device(name, case):
    # fresh inputs every run: a result left in memory by another run cannot pass for this one's
    check(case, name, "bfloat16", seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sizes", MOSAIC_SIZES, ids=str)
@pytest.mark.parametrize("case", ["llama-8b ragged", "llama-8b window", "llama-8b mixed step"])
def test_every_mosaic_schedule_on_device(case, sizes):
    check(LARGE[case], "mosaic_sm90", "bfloat16", seed=fresh_seed(), **sizes)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("packed", "programs"), [(1, 0), (2, 7), (4, 1), (4, 0)])
def test_mosaic_packing_on_device(packed, programs):
    sizes = {"packed": packed, "programs": programs}
    check(LARGE["llama-8b ragged"], "mosaic_sm90", "bfloat16", seed=fresh_seed(), **sizes)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["smollm mixed", "window", "head dim 80"])
@pytest.mark.parametrize("name", ["mosaic_sm90", "triton", "xla"])
def test_other_dtypes_on_device(name, case, dtype):
    check(EDGES[case], name, dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", cases.LARGE, **by_name)
def test_default_order_on_device(case):
    arrays = case.inputs(7, jnp.bfloat16)
    reach = case.reach()
    got = jax.jit(functools.partial(paged_prefill, **case.options))(*arrays, reach=reach)
    live = case.live()
    tolerance = FP8_TOLERANCE if case.fp8 else TOLERANCE
    expected = want(*arrays, reach=reach, **case.options)[live]
    assert_close(np.asarray(got)[live], expected, "bfloat16", tolerance)
