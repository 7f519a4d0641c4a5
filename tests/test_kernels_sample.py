"""sample: every implementation against the NumPy reference, and the draws against their
distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from pallas_kernels import SampleRows, SlotLists, compat, sample
from pallas_kernels.sample import cases, noise
from pallas_kernels.sample import reference as plain
from pallas_kernels.sample.api import FLOATS
from tests.kernels.draws import ALONE, SMALL, draw
from tests.kernels.support import (
    ON_GPU,
    fresh_seed,
    implementation,
    needs_gpu,
    quiet,
    reference,
)
from tests.marks import long, long_but

pytestmark = quiet
interpreted = pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
EDGES = {case.name: case for case in cases.EDGES}
by_name = {"ids": lambda case: case.name}
want = reference("sample")
RAW = 300


def sizes_of(case):
    """Of interpreted kernels: small rows are decided without refine, others in it."""
    return ALONE if case.vocab <= 300 else SMALL


def assert_logprobs(got, expected, rows, *, order=True):
    """Where somebody asked; the rest must be finite. order: of the best, also when an ulp of their
    values could change it."""
    for array in got:
        assert np.isfinite(array).all()
    for b in np.flatnonzero((rows.live != 0) & (rows.wants_logprob != 0)):
        top, named = int(rows.num_top[b]), int(rows.num_named[b])
        if order:
            np.testing.assert_array_equal(got.top_ids[b, :top], expected.top_ids[b, :top])
        for have, should in (
            (got.logprob[b], expected.logprob[b]),
            (got.top_values[b, :top], expected.top_values[b, :top]),
            (got.named[b, :named], expected.named[b, :named]),
        ):
            np.testing.assert_allclose(have, should, rtol=3e-6, atol=3e-5)


def check(name, case, seed=0, *, sizes=()):
    """With raw logprobs in the vocabulary of most cases, so that they need no program more."""
    raw = case.vocab == RAW
    inputs = case.inputs(seed)
    got = draw(name, case, inputs, raw=raw, sizes=sizes)
    expected = want(*inputs, top=case.top, raw_logprobs=raw)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert_logprobs(got, expected, inputs[1])


# each with programs of its own, which others have the parts of
RARE = (
    "random tiny", "random one row", "as many top as chunks have tokens", "more top than V",
    "random across blocks", "random flat across blocks", "ties across blocks",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [long(case) if case.name in RARE[:4] else case for case in cases.EDGES],
    **by_name,
)
def test_xla(case):
    check("xla", case)


@interpreted
@pytest.mark.parametrize(
    "case", [long(case) if case.name in RARE else case for case in cases.EDGES], **by_name
)
def test_triton_interpreted(case):
    check("triton", case, sizes=sizes_of(case))


RANDOM = [name for name in EDGES if name.startswith("random")]


@pytest.mark.parametrize("seed", long_but(range(1, 9), 1, 2, 3, 4))
@pytest.mark.parametrize("name", long_but(RANDOM, *(x for x in RANDOM if x not in RARE[:2])))
def test_xla_on_random_rows(name, seed):
    check("xla", EDGES[name], seed)


@interpreted
@pytest.mark.parametrize("seed", long_but(range(1, 9), 1, 2, 3, 4))
@pytest.mark.parametrize("name", long_but(RANDOM, *(x for x in RANDOM if x not in RARE)))
def test_triton_on_random_rows(name, seed):
    check("triton", EDGES[name], seed, sizes=sizes_of(EDGES[name]))


@pytest.mark.parametrize("name", ["xla", pytest.param("triton", marks=interpreted)])
def test_raw_logprobs(name):
    for seed in range(4):
        for case in ("random", "NaN and infinities"):
            assert EDGES[case].vocab == RAW
            check(name, EDGES[case], seed, sizes=sizes_of(EDGES[case]) if name == "triton" else ())


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [
        ALONE,
        (("lanes", 128), ("programs", 64), ("rounds", 3), ("refine_lanes", 128)),
        (("lanes", 2048), ("programs", 10), ("rounds", 2), ("refine_programs", 10)),
    ],
)
@pytest.mark.long
def test_sizes_change_nothing(sizes):
    for name in ("random flat across blocks", "random across blocks", "ties across blocks"):
        check("triton", EDGES[name], 3, sizes=sizes)


@interpreted
@pytest.mark.long
def test_small_rows_are_decided_the_same_in_refine():
    for case in cases.EDGES:
        if case.vocab == RAW and case.batch == 5:
            check("triton", case, sizes=SMALL)


@interpreted
@pytest.mark.parametrize("fixed", [long(False), True])
@pytest.mark.long
def test_how_rows_are_split_changes_nothing(fixed):
    """Rows that take several passes, each by itself among decided ones, and all together."""
    case = EDGES["random across halves"]
    logits, rows, slots = case.inputs(6)
    filters = {"top_p": np.float32(0.7), "top_k": np.int32(1 << 30), "min_p": np.float32(0)}
    rows = rows._replace(
        live=np.ones_like(rows.live),
        **{k: np.full_like(rows.top_k, v, v.dtype) for k, v in filters.items()},
    )
    run = implementation("sample", "triton", interpret=True, **{**dict(SMALL), "rounds": 3})
    call = jax.jit(functools.partial(run, top=0, raw_logprobs=False, fixed_split=fixed))
    together = np.asarray(call(logits, rows, slots).tokens)
    np.testing.assert_array_equal(
        together, want(logits, rows, slots, top=0, raw_logprobs=False).tokens
    )
    for b in range(len(together)):
        greedy = np.where(np.arange(len(together)) == b, rows.top_k, 1).astype(np.int32)
        alone = call(logits, rows._replace(top_k=greedy), slots).tokens
        assert np.asarray(alone)[b] == together[b]


# -- noise ----------------------------------------------------------------------------------------


def test_keys_and_words_of_twenty_rounds_are_those_of_jax():
    triples = [(0, 0, 0), (7, 3, 1000), (-5, 1, 2**31 - 1), (2**31 - 1, 9, 12)]
    arrays = [np.asarray(column, np.int32) for column in zip(*triples, strict=True)]
    keys = noise.row_keys(*map(jnp.asarray, arrays))
    for b, (seed, index, position) in enumerate(triples):
        key = jax.random.key(np.uint32(seed & 0xFFFFFFFF), impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, index), position)
        words = jax.random.key_data(key)
        np.testing.assert_array_equal([keys[0][b], keys[1][b]], words)
        counters = np.arange(33, dtype=np.uint32)
        expected = threefry_2x32(words, jnp.concatenate([counters, jnp.zeros(33, jnp.uint32)]))
        words = keys[0][b], keys[1][b], counters, np.zeros_like(counters)
        got = noise.threefry2x32(*words, rounds=20)
        np.testing.assert_array_equal(np.concatenate(got), expected)


@pytest.mark.parametrize(
    "key, counter, expected",
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0xFD36D048, 0x2D17272C)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_thirteen_rounds_give_the_known_answers(key, counter, expected):
    """Of the authors' library Random123 for threefry2x32-13."""
    got = noise.threefry2x32(*map(np.uint32, (*key, *counter)), rounds=noise.ROUNDS)
    assert tuple(map(int, got)) == expected


def test_tokens_use_the_word_of_their_place_in_a_block():
    sizes = (1, 2047, 2048, 2049, 4096, 4097, 9001)
    key = noise.row_keys(*(jnp.asarray([n], jnp.int32) for n in (3, 1, 4)))
    token = np.arange(max(sizes))
    block, place = np.divmod(token, 2 * noise.HALF)
    counters = np.asarray(block * noise.HALF + place % noise.HALF, np.uint32)
    words = noise.threefry2x32(*key, counters, np.zeros_like(counters), rounds=noise.ROUNDS)
    words = np.asarray(words)
    expected = noise.gumbel(words[place // noise.HALF, token])
    rows = jax.jit(noise.gumbel_rows, static_argnums=2)
    for vocab in sizes:
        # XLA's log may differ in the last bit between the ends and the middle of an array
        got = np.asarray(rows(*key, vocab))
        np.testing.assert_allclose(got, expected[None, :vocab], rtol=3e-7, atol=3e-7)
        assert noise.counter_count(vocab) == counters[:vocab].max() + 1


def test_noise_is_finite_and_exact_at_the_ends():
    bits = np.asarray([0, 1, 2, 255, 2**22, 2**24, 2**31, 2**32 - 300, 2**32 - 1], np.uint32)
    got = np.asarray(noise.exponential(jnp.asarray(bits)), np.float64)
    w = (bits.astype(np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(got[:7], -np.log1p(-w[:7]), rtol=1e-6)
    assert (got > 0).all() and got.max() < 17.4
    assert np.isfinite(np.asarray(noise.gumbel(jnp.asarray(bits)))).all()
    assert (np.diff(got) >= 0).all()


def test_moments_of_the_noise():
    keys = noise.row_keys(*(jnp.arange(20, dtype=jnp.int32) + n for n in (5, 0, 9)))
    gumbel = np.asarray(jax.jit(noise.gumbel_rows, static_argnums=2)(*keys, 100_000), np.float64)
    exponential = np.exp(-gumbel)
    count = gumbel.size
    for value, mean, variance in (
        (exponential, 1.0, 1.0),
        (exponential**2, 2.0, 20.0),
        (gumbel, np.euler_gamma, np.pi**2 / 6),
    ):
        assert abs(value.mean() - mean) < 5 * np.sqrt(variance / count)
    assert abs(gumbel.var() - np.pi**2 / 6) < 0.01
    centred = gumbel - gumbel.mean()
    for lag in (1, noise.HALF, 2 * noise.HALF):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean()) < 0.006


@pytest.mark.parametrize("name", ["xla", pytest.param("triton", marks=interpreted)])
def test_a_row_draws_the_same_in_any_company(name):
    case = EDGES["random across halves"]
    logits, rows, slots = case.inputs(4)
    live = rows._replace(live=np.ones_like(rows.live))
    sizes = sizes_of(case) if name == "triton" else ()
    together = draw(name, case, (logits, live, slots), sizes=sizes).tokens
    order = np.asarray([3, 0, 4, 4, 1])
    company = SampleRows(*(array[order] for array in live))
    mixed = draw(name, case, (logits[order], company, slots), sizes=sizes).tokens
    np.testing.assert_array_equal(mixed, together[order])


# -- lowering, mistakes ---------------------------------------------------------------------------


def shapes(batch, vocab, slots=9, bias=64, named=16):
    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = SampleRows(
        *(
            array((batch,), jnp.float32 if name in FLOATS else jnp.int32)
            for name in SampleRows._fields
        )
    )
    lists = SlotLists(
        array((slots, vocab)), array((slots, bias)), array((slots, bias), jnp.float32),
        array((slots, bias)), array((slots, named)),
    )  # fmt: skip
    return array((batch, vocab), jnp.float32), rows, lists


def lowers(batch, vocab, top, *, raw):
    run = implementation("sample", "triton", interpret=False)
    run = functools.partial(run, top=top, raw_logprobs=raw, fixed_split=top == 3)
    text = compat.lower_for_cuda(run, *shapes(batch, vocab))
    # the rounds of refine share one
    assert text.count("custom_call @") == 3


PROGRAMS = ((151_936, 20, False), (128_256, 3, True))


@pytest.mark.long
def test_programs_without_top_lower_for_cuda():
    for batch in (1, 8):
        lowers(batch, 128_256, 0, raw=True)


@pytest.mark.parametrize("batch", long_but([1, 8, 512], 8))
def test_lowers_for_cuda(batch):
    for vocab, top, raw in PROGRAMS:
        lowers(batch, vocab, top, raw=raw)


def test_xla_lowers_for_cuda():
    run = implementation("sample", "xla", interpret=False)
    run = functools.partial(run, top=20, raw_logprobs=False)
    assert "scatter" in compat.lower_for_cuda(run, *shapes(8, 128_256))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((2, 9), np.float16)}, "logits float16"),
        ({"logits": np.zeros(9, np.float32)}, "logits float32"),
        ({"top_k": np.zeros(2, np.float32)}, "rows.top_k"),
        ({"min_p": np.zeros(3, np.float32)}, "rows.min_p"),
        ({"counts": np.zeros((3, 8), np.int32)}, "slots.counts"),
        ({"bias_until": np.zeros((3, 5), np.int32)}, "slots.bias_until"),
        ({"named_ids": np.zeros((2, 3), np.int32)}, "slots.named_ids"),
        ({"top": -1}, "top=-1"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"logits": np.zeros((2, 9), np.float32), "top": 3}
    rows, slots = cases.row_params([{}, {}]), cases.empty_lists(3, 9)
    (name, value), = change.items()  # fmt: skip
    if name in arguments:
        arguments[name] = value
    elif name in SampleRows._fields:
        rows = rows._replace(**change)
    else:
        slots = slots._replace(**change)
    with pytest.raises(ValueError, match=message):
        sample(arguments["logits"], rows, slots, top=arguments["top"], raw_logprobs=False)


def test_the_public_function():
    case = EDGES["random"]
    inputs = case.inputs(2)
    expected = want(*inputs, top=case.top, raw_logprobs=False)
    call = jax.jit(functools.partial(sample, top=case.top, raw_logprobs=False))
    np.testing.assert_array_equal(call(*inputs).tokens, expected.tokens)


# -- on a device ----------------------------------------------------------------------------------


def near_tie(inputs, b, tokens):
    """Whether float32 may decide between two tokens of row b: scores, or what keeps one, within
    1e-4."""
    logits, rows, slots = inputs
    row = SampleRows(*(array[b] for array in rows))
    x = plain.processed(logits[b], row, slots)
    if row.top_k == 1:
        return abs(x[tokens[0]] - x[tokens[1]]) <= 1e-4
    x = plain.scaled(x, row.temperature)
    score = plain.scores(x, row)[list(tokens)]
    p = plain.probabilities(x)
    floor = x.max() + np.log(max(float(row.min_p), 1e-300))
    # a penalized logit that differs by an ulp breaks a tie of the count
    near = [abs(score[0] - score[1]) <= 1e-4 * max(1, abs(score[0]))]
    for token in tokens:
        near.append(abs(p[x > x[token]].sum() - row.top_p) <= 1e-4)
        near.append(abs(x[token] - floor) <= 1e-4)
        near.append(np.sum(np.abs(x - x[token]) <= 1e-4) > 1 and row.top_k < x.size)
    return any(near)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "name",
    [
        "random across blocks", "random flat across blocks", "ties across blocks", "all equal",
        "NaN and infinities", "all banned", "one token with many biases", "penalties",
        "no lists, no top", "more top than V",
    ],
)  # fmt: skip
def test_edges_on_device(name):
    # seed 0 is free of near ties, as the tests on a CPU show
    check("triton", EDGES[name])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", cases.LARGE, **by_name)
def test_large_on_device(case):
    different = total = 0
    for _ in range(4):
        inputs = case.inputs(fresh_seed())
        on_device = jax.device_put(inputs)
        got, expected = (draw(name, case, on_device) for name in ("triton", "xla"))
        for b in np.flatnonzero(got.tokens != expected.tokens):
            assert near_tie(inputs, b, (got.tokens[b], expected.tokens[b])), (case.name, b)
            different += 1
        total += case.batch
        same = np.flatnonzero(got.tokens == expected.tokens)
        rows = SampleRows(*(array[same] for array in inputs[1]))
        pick = [type(got)(*(array[same] for array in result)) for result in (got, expected)]
        assert_logprobs(*pick, rows, order=False)
    assert different <= 0.01 * total
