"""The built-in transforms against Hugging Face's processors, or NumPy written from the papers."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import special, stats
from transformers import generation

from jaxserve import transforms
from jaxserve.transforms import chain, detect_watermark, joint, selection
from tests.transform_context import ROOM, applier, buffer, context_at, padded, params_of

SIZES = (12, 211, 4096)
DRAWS = 20_000
BUILT_IN = {
    name: getattr(transforms, name)
    for name in transforms.__all__
    if name.islower() and name not in ("automaton", "chain", "joint", "detect_watermark")
}
"""Those whose parameters are each request's."""


def built_in(name, **sizes):
    make = BUILT_IN[name]
    return make([3], **sizes) if name == "exponential_decay_length" else make(**sizes)


@functools.cache
def applied(name, **sizes):
    """`applier` of a built-in transform, compiled once for all tests."""
    return applier(built_in(name, **sizes))


def rows(size, count=6, seed=0):
    """[count, size] logits: of several scales, with ties, with -inf, and with both."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, size)) * np.linspace(0.5, 5, count)[:, None]
    logits[count // 2 :] = np.round(logits[count // 2 :] * 4) / 4
    gone = rng.random((count, size)) < 0.4
    gone[:, rng.integers(size, size=2)] = False
    logits[1::2] = np.where(gone[1::2], -np.inf, logits[1::2])
    return logits.astype(np.float32)


def by_hugging_face(processor, logits, texts=None):
    """What a processor makes of each row, one at a time: texts may be of different lengths."""
    texts = texts or [[0]] * len(logits)
    found = [
        processor(torch.tensor([text]), torch.tensor(row[None]))
        for text, row in zip(texts, logits, strict=True)
    ]
    return torch.cat(found).numpy()


def random_texts(count, vocab, lengths, seed=1):
    """Of at most `vocab` tokens, some of fewer, so that they repeat themselves."""
    rng = np.random.default_rng(seed)
    several = rng.integers(min(2, vocab), vocab, size=count, endpoint=True)
    return [rng.integers(most, size=rng.choice(lengths)).tolist() for most in several]


# -- filters ---------------------------------------------------------------------------------------

FILTERS = [
    ("min_p", "MinPLogitsWarper", (0.01, 0.3, 0.999)),
    ("epsilon_cutoff", "EpsilonLogitsWarper", (1e-3, 0.05, 0.9)),
    ("eta_cutoff", "EtaLogitsWarper", (1e-3, 0.05, 0.9)),
    ("typical_p", "TypicalLogitsWarper", (0.05, 0.5, 0.95)),
]


@pytest.mark.parametrize("name, warper, values", FILTERS, ids=[entry[0] for entry in FILTERS])
def test_filters_keep_what_hugging_face_keeps(name, warper, values):
    apply = applied(name)
    for size in SIZES:
        logits = rows(size, seed=size)
        for value in values:
            wanted = by_hugging_face(getattr(generation, warper)(value), logits)
            np.testing.assert_array_equal(apply(logits, **{name: value}), wanted)


def test_typical_tokens_of_a_large_vocabulary_and_of_nothing_but_ties():
    apply, logits = applied("typical_p"), rows(50_000, 4)
    wanted = by_hugging_face(generation.TypicalLogitsWarper(0.9), logits)
    np.testing.assert_array_equal(apply(logits, typical_p=0.9), wanted)
    same = np.zeros((1, 12), np.float32)
    np.testing.assert_array_equal(apply(same, typical_p=0.2), same)


@pytest.mark.parametrize("mass", [0.25, 0.7, 1.0, 9.0])
def test_the_mass_search_is_a_sort_and_a_sum(mass):
    """In numbers of which float32 sums are exact in any order."""
    rng = np.random.default_rng(5)
    keys = np.abs(rng.normal(size=(20, 300)).round(1)).astype(np.float32) / 4
    keys[0] *= 1e-20
    weights = rng.multinomial(1024, np.full(300, 1 / 300), size=20).astype(np.float32) / 1024
    keys[:, ::7], weights[:, ::7] = np.inf, 0

    def search(pairs):
        return selection.smallest_with_mass(pairs, lambda both: (both[0], both[1]), mass)

    found = jax.jit(jax.vmap(search, 1))(jnp.stack([keys, weights]))
    for row, key, weight in zip(np.asarray(found), keys, weights, strict=True):
        order = np.argsort(key, kind="stable")
        sums = np.cumsum(weight[order])
        crossing = np.searchsorted(sums, mass)
        limit = key[order[crossing]] if crossing < len(key) else 2
        np.testing.assert_array_equal(row, key <= limit)


@pytest.mark.parametrize("size, count", [(12, 12), (100, 3), (4099, 5), (40_000, 100)])
def test_the_largest_are_those_of_top_k(size, count):
    values = rows(size, 4, seed=size)
    found = jax.jit(jax.vmap(lambda row: selection.largest(row, count)))(values)
    for one, other in zip(found, jax.lax.top_k(values, count), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_top_h_keeps_what_hugging_face_keeps(share):
    """But for the choice among equal tokens: those of lower ids, as NumPy says."""
    apply = applied("top_h")
    for size in SIZES:
        logits = rows(size, seed=size)
        found = apply(logits, top_h=share)
        wanted = by_hugging_face(generation.logits_process.TopHLogitsWarper(share), logits)
        np.testing.assert_array_equal(np.sort(found), np.sort(wanted))
        for row, kept in zip(logits, found > -np.inf, strict=True):
            order = np.argsort(-row, kind="stable")
            np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(order[: kept.sum()]))


def test_top_h_of_a_certain_token_keeps_it_alone():
    certain = np.array([[0, 900, 1, 2]], np.float32)
    found = applied("top_h")(certain, top_h=0.4)
    np.testing.assert_array_equal(found, [[-np.inf, 900, -np.inf, -np.inf]])


@pytest.mark.parametrize("sigmas", [0.3, 1.0, 2.5])
def test_top_n_sigma_is_the_papers(sigmas):
    """With the deviation of the tokens that are there."""
    apply = applied("top_n_sigma")
    for size in SIZES:
        logits = rows(size, seed=size)
        wanted = logits.copy()
        for row in wanted:
            there = row[np.isfinite(row)].astype(np.float64)
            sigma = np.sqrt(np.mean((there - there.mean()) ** 2))
            row[row < there.max() - sigmas * sigma] = -np.inf
        np.testing.assert_array_equal(apply(logits, top_n_sigma=sigmas), wanted)


def numpy_xtc(row, threshold):
    """From the description: down the sorted list, all above the threshold but the last go."""
    p = special.softmax(row.astype(np.float64))
    order = np.argsort(-p, kind="stable")
    above = [token for token in order if p[token] >= threshold]
    wanted = row.copy()
    wanted[above[:-1]] = -np.inf
    return wanted


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.51])
def test_xtc_excludes_all_top_choices_but_one(threshold):
    apply = applied("xtc")
    for size in SIZES:
        logits = rows(size, seed=size)
        wanted = np.stack([numpy_xtc(row, threshold) for row in logits])
        found = apply(logits, xtc_probability=1.0, xtc_threshold=threshold)
        np.testing.assert_array_equal(found, wanted)
        never = apply(logits, xtc_probability=0.0, xtc_threshold=threshold)
        np.testing.assert_array_equal(never, logits)


def test_mirostat_holds_its_target_as_the_algorithm_says():
    """A text drawn by the transform, beside Algorithm 2 in float64: the same tokens stay each time,
    mu is the same, and the mean surprise is near the target."""
    transform, size, tau, eta = transforms.mirostat(), 800, 3.0, 0.2
    params = params_of(transform, mirostat_tau=tau, mirostat_eta=eta)
    state, mu = transform.init(params), 2 * tau
    context = context_at(buffer([0]), 1)
    apply = jax.jit(lambda logits, state: transform.apply(logits, state, params, context))
    observe = jax.jit(transform.observe)
    rng, surprises = np.random.default_rng(3), []
    for logits in rng.normal(size=(150, size)).astype(np.float32) * 3:
        kept = np.asarray(apply(logits, state)) > -np.inf
        surprise = -special.log_softmax(logits.astype(np.float64)) / np.log(2)
        wanted = surprise <= mu
        wanted[surprise.argmin()] = True
        np.testing.assert_array_equal(kept, wanted)
        p = special.softmax(np.where(kept, logits, -np.inf).astype(np.float64))
        token = rng.choice(size, p=p)
        surprises.append(-np.log2(p[token]))
        state = observe(state, params, jnp.int32(token), jnp.float32(np.log(p[token])))
        mu -= eta * (surprises[-1] - tau)
        assert abs(float(state) - mu) < 1e-4
    assert abs(np.mean(surprises[30:]) - tau) < 0.3


@pytest.mark.parametrize("value", [0.3, 1.0, 2.0])
def test_temperature_divides(value):
    logits = rows(211)
    wanted = by_hugging_face(generation.TemperatureLogitsWarper(value), logits)
    found = applied("temperature")(logits, temperature=value)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_temperature_of_0_leaves_the_likeliest():
    logits = rows(211)
    best = logits == logits.max(axis=1, keepdims=True)
    found = applied("temperature")(logits, temperature=0.0)
    np.testing.assert_array_equal(found, np.where(best, logits, -np.inf))


# -- repetition ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_ngram_comes_twice(size):
    apply = applied("no_repeat_ngram", window=ROOM, longest=8)
    logits, texts = rows(12, 40, seed=size), random_texts(40, 3, [1, 2, 4, 9, 30, 60])
    wanted = by_hugging_face(generation.NoRepeatNGramLogitsProcessor(size), logits, texts)
    wanted = np.where((wanted > -np.inf).any(axis=1, keepdims=True), wanted, logits)
    found = apply(logits, texts, no_repeat_ngram_size=size)
    assert (found != logits).any()
    np.testing.assert_array_equal(found, wanted)


def test_ngrams_before_the_window_are_forgotten():
    apply = applied("no_repeat_ngram", window=6)
    logits, texts = np.zeros((2, 9), np.float32), [[5, 1, 2, 3, 4, 0, 5], [1, 2, 5, 3, 4, 0, 5]]
    found = apply(logits, texts, no_repeat_ngram_size=2)
    np.testing.assert_array_equal(found > -np.inf, [[True] * 9, [True] * 3 + [False] + [True] * 5])


def numpy_dry(row, text, multiplier, base, allowed, breakers):
    """From the description: for each earlier place, walk back while the text before it is what the
    text ends with."""
    longest = {}
    for place in range(1, len(text)):
        length = 0
        while length < place and text[place - 1 - length] == text[-1 - length]:
            if text[-1 - length] in breakers:
                break
            length += 1
        token = text[place]
        if length and token not in breakers:
            longest[token] = max(length, longest.get(token, 0))
    wanted = row.copy()
    for token, length in longest.items():
        if length >= allowed:
            wanted[token] -= multiplier * base ** (length - allowed)
    return wanted


@pytest.mark.parametrize("breakers", [(), (0,), (1, 2)])
@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_dry_penalizes_longer_repetitions_more(allowed, breakers):
    apply = applied("dry", window=ROOM, longest=ROOM, breakers=3)
    logits, texts = rows(12, 40, seed=allowed), random_texts(40, 4, [1, 2, 5, 20, 60], seed=allowed)
    settings = 0.8, 1.75, allowed, breakers
    wanted = np.stack([numpy_dry(*pair, *settings) for pair in zip(logits, texts, strict=True)])
    found = apply(
        logits,
        texts,
        dry_multiplier=0.8,
        dry_allowed_length=allowed,
        dry_breakers=padded([breakers], 1, 3)[0],
    )
    assert (found != logits).any()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_dry_stays_finite_and_counts_up_to_its_longest():
    text = [3] * 60
    apply = applied("dry", window=ROOM, longest=20)
    logits = np.ones((1, 5), np.float32)
    found = apply(logits, [text], dry_multiplier=2.0, dry_base=1.1)
    np.testing.assert_allclose(found[0, 3], 1 - 2 * 1.1**18, rtol=1e-5)
    found = apply(logits, [text], dry_multiplier=1e20, dry_base=1e9)
    assert np.isfinite(found).all() and found[0, 3] < -1e29
    np.testing.assert_array_equal(apply(logits, [text], dry_base=1e9), logits)


# -- named tokens ----------------------------------------------------------------------------------

SEQUENCES = [[4], [1, 2], [0, 0], [2, 1, 0], [0, 1, 0, 2], [2], [1, 0, 0]]
TEXTS = [*random_texts(30, 3, [1, 2, 3, 10, 40], seed=8), [1], [2, 1]]


def test_bad_words_never_end():
    logits = rows(12, len(TEXTS))
    wanted = by_hugging_face(generation.NoBadWordsLogitsProcessor(SEQUENCES), logits, TEXTS)
    wanted = np.where((wanted > -np.inf).any(axis=1, keepdims=True), wanted, logits)
    found = applied("bad_words")(logits, TEXTS, bad_words=padded(SEQUENCES, 16, 8))
    assert (found != logits).any()
    np.testing.assert_array_equal(found, wanted)


def test_single_bad_words_need_no_history():
    logits = rows(12)
    apply = applied("bad_words", count=2, length=1)
    wanted = by_hugging_face(generation.NoBadWordsLogitsProcessor([[4], [7]]), logits)
    wanted = np.where((wanted > -np.inf).any(axis=1, keepdims=True), wanted, logits)
    np.testing.assert_array_equal(apply(logits, bad_words=[[4], [7]]), wanted)


def test_biased_sequences_are_summed_at_their_last_token():
    logits = rows(12, len(TEXTS))
    values = [-2.5, 3.0, 0.25, -0.5, 7.0, 1.5, 0.75]
    pairs = [[ids, value] for ids, value in zip(SEQUENCES, values, strict=True)]
    wanted = by_hugging_face(generation.SequenceBiasLogitsProcessor(pairs), logits, TEXTS)
    found = applied("sequence_bias", count=9, length=4)(
        logits,
        TEXTS,
        bias_sequences=padded(SEQUENCES, 9, 4),
        bias_values=np.array([*values, 0.0, 5.0]),
    )
    assert (found != logits).any()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_biases_of_0_leave_every_bit():
    logits = np.full((1, 5), -0.0, np.float32)
    apply = applied("sequence_bias", count=2, length=1)
    found = apply(logits, bias_sequences=[[1], [2]], bias_values=[0.0, 2.0])
    assert np.signbit(found).tolist() == [[True, True, False, True, True]]


def test_forced_tokens_are_those_of_their_places():
    apply, logits = applied("forced_tokens", count=4), rows(12, 7)
    texts = [[9] * (2 + step) for step in range(7)]
    found = apply(logits, texts, [2] * 7, forced_tokens=[5, -1, 3, 7])
    first = generation.ForcedBOSTokenLogitsProcessor(5)(torch.tensor([[9]]), torch.tensor(logits))
    third = generation.ForcedEOSTokenLogitsProcessor(2, 3)(
        torch.tensor([[9]]), torch.tensor(logits)
    )
    np.testing.assert_array_equal(found[0], first[0])
    np.testing.assert_array_equal(found[2], third[2])
    assert (found[3] > -np.inf).nonzero()[0] == [7]
    free = [1, 4, 5, 6]
    np.testing.assert_array_equal(found[free], logits[free])


def test_a_text_that_grows_too_long_wants_to_end():
    ends, factor = [3, 7], 1.2
    apply, logits = applier(transforms.exponential_decay_length(ends)), rows(12, 30)
    logits[::4, 3] = -np.inf
    texts = [[9] * (2 + step) for step in range(30)]
    penalty = generation.logits_process.ExponentialDecayLengthPenalty((5, factor), ends, 2)
    wanted = by_hugging_face(penalty, logits, texts)
    found = apply(logits, texts, [2] * 30, decay_start=5, decay_factor=factor)
    assert (found != logits).any()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


# -- the watermark ---------------------------------------------------------------------------------


def mixed(bits):
    """MurmurHash3's finalizer, in Python's numbers."""
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16


def is_green(before, token, key, ratio):
    seed = key % 2**32
    for each in before:
        seed = mixed(seed ^ each * 0x9E3779B1 % 2**32)
    return (mixed(mixed(token * 0x85EBCA77 % 2**32) ^ seed) >> 8) / 2**24 < ratio


@pytest.mark.parametrize("width", [1, 3])
def test_the_watermark_raises_what_the_detector_calls_green(width):
    key, ratio, vocab = -77, 0.4, 211
    apply, logits = applied("kgw_watermark", width=width), rows(vocab)
    texts = random_texts(len(logits), 50_000, [5, 9])
    found = apply(logits, texts, watermark_bias=1.5, watermark_key=key, watermark_ratio=ratio)
    for row, before, text in zip(found, logits, texts, strict=True):
        green = [is_green(text[-width:], token, key, ratio) for token in range(vocab)]
        np.testing.assert_array_equal(row, np.where(green, before + np.float32(1.5), before))
        several = [
            detect_watermark([token], text, ratio=ratio, key=key, width=width).green[0]
            for token in range(20)
        ]
        assert several == green[:20]
    short = apply(logits, [[1] * (width - 1)] * len(logits), watermark_bias=1.5)
    np.testing.assert_array_equal(short, logits)


@pytest.mark.parametrize("ignore_repeated", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_detection_counts_as_hugging_face_does(width, ignore_repeated):
    tokens, key, ratio = random_texts(1, 9, [150])[0], 5, 0.3
    theirs = generation.WatermarkDetector
    detector = SimpleNamespace(
        processor=SimpleNamespace(seeding_scheme="lefthash", context_width=width),
        ignore_repeated_ngrams=ignore_repeated,
        greenlist_ratio=ratio,
        _get_ngram_score_cached=lambda before, token: is_green(before.tolist(), token, key, ratio),
    )
    scored, green = theirs._score_ngrams_in_passage(detector, torch.tensor([tokens]))
    z = theirs._compute_z_score(detector, green, scored)[0]
    options = {"ratio": ratio, "key": key, "width": width, "ignore_repeated": ignore_repeated}
    for found in (
        detect_watermark(tokens, **options),
        detect_watermark(tokens[width:], tokens[:width], **options),
    ):
        assert found.scored.sum() == scored[0]
        assert (found.green & found.scored).sum() == green[0]
        assert found.z == pytest.approx(z)
    assert len(detect_watermark(tokens, **options).green) == len(tokens)


def test_a_marked_text_is_found_and_a_plain_one_is_not():
    size, length = 500, 200
    transform = transforms.kgw_watermark()

    params = params_of(transform, watermark_bias=2.0)

    def write(seed):

        def draw(token, key):
            keys = jax.random.split(key)
            logits = jax.random.normal(keys[0], (size,))
            context = context_at(jnp.full(ROOM, token), 1)
            token = jax.random.categorical(keys[1], transform.apply(logits, (), params, context))
            return token, token

        return jax.lax.scan(draw, jnp.int32(1), jax.random.split(jax.random.key(seed), length))[1]

    texts = np.asarray(jax.jit(jax.vmap(write))(jnp.arange(20)))
    assert min(detect_watermark(text, [1]).z for text in texts) > 4
    assert max(detect_watermark(text, [1], key=6).z for text in texts) < 4
    plain = np.random.default_rng(7).integers(size, size=(400, length))
    z = np.array([detect_watermark(text, [1]).z for text in plain])
    assert abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.15 and z.max() < 4


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        ([1, 2], {"ratio": 1.0}, "ratio must be .*got 1.0"),
        ([1, 2], {"ratio": 0.0}, "ratio must be .*got 0"),
        ([1, 2], {"width": 0}, "width must be .*got 0"),
        ([1, 2], {"key": 2**31}, "key must be"),
        ([1, 2], {"width": 2}, "none of 2 has width=2 tokens before it"),
        ([], {"prompt": [1]}, "none of 0"),
    ],
)
def test_what_cannot_be_detected_is_an_error(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        detect_watermark(tokens, **options)


# -- coins and chains ------------------------------------------------------------------------------

SMALL = np.array([2.0, 1.9, 1.9, 1.0, 0.5, 0.0, -0.5, -0.5, -1.0, -3.0])


def drawn(transform, **given):
    """How often each token of SMALL is drawn, of DRAWS requests that differ by their seeds."""
    params = params_of(transform, **given)

    def draw(seed):
        context = context_at(buffer([3, 1]), 2, seed=seed)
        logits = transform.apply(jnp.float32(SMALL), transform.init(params), params, context)
        return jax.random.categorical(jax.random.fold_in(jax.random.key(9), seed), logits)

    tokens = jax.jit(jax.vmap(draw))(jnp.arange(DRAWS))
    return np.bincount(np.asarray(tokens), minlength=len(SMALL))


def fits(counts, p):
    """Whether chi-square says that `counts` are draws of `p`, and none is of probability 0."""
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] / p.sum(dtype=np.float64)
    return stats.chisquare(counts[p > 0], DRAWS * expected).pvalue > 1e-3


def marked(logits, bias, ratio=0.25, key=15485863):
    green = [is_green([1], token, key, ratio) for token in range(len(logits))]
    assert 0 < sum(green) < len(green)
    return np.where(green, logits + bias, logits)


def test_xtc_throws_its_coin_as_often_as_it_says():
    plain, without = special.softmax(SMALL), special.softmax(numpy_xtc(SMALL, 0.15))
    counts = drawn(transforms.xtc(), xtc_probability=0.3, xtc_threshold=0.15)
    assert fits(counts, 0.7 * plain + 0.3 * without)
    assert not fits(counts, 0.6 * plain + 0.4 * without)


def test_the_watermarks_bias_is_that_of_the_paper():
    counts = drawn(transforms.kgw_watermark(), watermark_bias=1.0, watermark_ratio=0.5)
    assert fits(counts, special.softmax(marked(SMALL, 1.0, 0.5)))
    assert not fits(counts, special.softmax(SMALL))


def test_a_chain_is_one_after_the_other():
    parts = transforms.temperature(), transforms.xtc(), transforms.top_n_sigma()
    given = {"temperature": 1.5, "xtc_probability": 0.4, "xtc_threshold": 0.15}
    given |= {"top_n_sigma": 1.6, "watermark_bias": 0.7}
    counts = drawn(chain(*parts, transforms.kgw_watermark()), **given)

    def ending(logits):
        there = logits[np.isfinite(logits)]
        kept = logits >= logits.max() - 1.6 * there.std()
        return special.softmax(marked(np.where(kept, logits, -np.inf), 0.7))

    hot = SMALL / 1.5
    assert fits(counts, 0.6 * ending(hot) + 0.4 * ending(numpy_xtc(hot, 0.15)))


def test_filters_that_are_joined_judge_the_same_logits():
    logits = rows(211)
    given = {"typical_p": 0.2, "min_p": 0.1, "top_h": 0.3}
    found = applier(joint(*map(built_in, given)))(logits, **given)
    kept = np.ones(logits.shape, bool)
    for name, value in given.items():
        kept &= applied(name)(logits, **{name: value}) > -np.inf
    nothing = ~kept.any(axis=1)
    assert 0 < nothing.sum() < len(logits)
    kept[nothing] = (logits == logits.max(axis=1, keepdims=True))[nothing]
    np.testing.assert_array_equal(found, np.where(kept, logits, -np.inf))


def test_several_positions_at_once_are_those_one_by_one():
    """As speculation asks: states after 0..K drafts by folding `observe`, then all positions."""
    everything = [built_in(name) for name in BUILT_IN]
    transform = chain(*everything)
    given = {"temperature": 0.8, "typical_p": 0.95, "min_p": 0.01, "top_n_sigma": 3.0}
    given |= {"xtc_probability": 0.5, "dry_multiplier": 0.8, "no_repeat_ngram_size": 3}
    given |= {"mirostat_tau": 2.5, "mirostat_eta": 0.5, "watermark_bias": 1.0, "top_h": 0.9}
    params = params_of(transform, **given)
    rng, size, drafts, prompt = np.random.default_rng(2), 300, 6, [5, 6, 7, 5, 6]
    logits = jnp.asarray(rng.normal(size=(drafts + 1, size)) * 2, jnp.float32)
    tokens, logprobs = jnp.array([7, 5, 6, 250, 3, 5]), jnp.linspace(-6.0, -0.5, drafts)
    text = buffer([*prompt, *tokens.tolist()])

    def at(logits, state, step):
        position = len(prompt) + step
        context = context_at(text, position, len(prompt), seed=4, vocab=size)
        return transform.apply(logits, state, params, context)

    def step(state, drawn):
        after = transform.observe(state, params, *drawn)
        return after, after

    first = transform.init(params)
    after = jax.lax.scan(step, first, (tokens, logprobs))[1]
    states = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, after)
    together = jax.jit(jax.vmap(at))(logits, states, jnp.arange(drafts + 1))
    state, single, mus = first, jax.jit(at), []
    for i in range(drafts + 1):
        np.testing.assert_array_equal(together[i], single(logits[i], state, jnp.int32(i)))
        [mu], [stacked] = jax.tree.leaves(state), jax.tree.leaves(states)
        np.testing.assert_allclose(stacked[i], mu, rtol=1e-6)
        mus.append(float(mu))
        if i < drafts:
            state = transform.observe(state, params, tokens[i], logprobs[i])
    assert len(set(mus)) == drafts + 1


# -- of all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "mirostat"])
def test_defaults_leave_every_bit(name):
    logits = rows(211)
    logits[:, :2] = 0.0, -0.0
    texts = random_texts(len(logits), 4, [0, 1, 30, 60])
    found = applied(name)(logits, texts, seeds=jnp.arange(len(logits)))
    np.testing.assert_array_equal(found.view(np.int32), logits.view(np.int32))


ALL = np.arange(12)[:, None]
EXTREMES = {
    "min_p": {"min_p": 5.0},
    "epsilon_cutoff": {"epsilon_cutoff": 1.0},
    "eta_cutoff": {"eta_cutoff": 1e9},
    "typical_p": {"typical_p": 0.0},
    "top_n_sigma": {"top_n_sigma": 1e-9},
    "top_h": {"top_h": 0.0},
    "mirostat": {"mirostat_tau": -9.0},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    "temperature": {"temperature": 0.0},
    "no_repeat_ngram": {"no_repeat_ngram_size": 1},
    "dry": {"dry_multiplier": 1e9, "dry_base": 1e9, "dry_allowed_length": 0},
    "bad_words": {"bad_words": padded(ALL.tolist(), 16, 8)},
    "sequence_bias": {
        "bias_sequences": padded(ALL.tolist(), 16, 8),
        "bias_values": [-np.inf] * 16,
    },
    "forced_tokens": {"forced_tokens": [12] * 16},
    "exponential_decay_length": {"decay_start": -99, "decay_factor": 1e9},
    "kgw_watermark": {"watermark_bias": -1e30},
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_token_is_always_left(name):
    """Whatever the parameters, of rows with one token left too."""
    logits = rows(12, 8)
    logits[0, 1:], logits[1, :-1] = -np.inf, -np.inf
    texts = [[*range(12)] * 3] * 8
    found = applied(name)(logits, texts, **EXTREMES[name])
    assert not np.isnan(found).any() and (found < np.inf).all()
    assert (found > -np.inf).any(axis=1).all()
    if not EXTREMES[name].keys() & {"forced_tokens"}:
        assert not (found > -np.inf)[logits == -np.inf].any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: transforms.top_h(candidates=0), "candidates must be .*got 0"),
        (lambda: transforms.no_repeat_ngram(window=1), "window must be .*got 1"),
        (lambda: transforms.no_repeat_ngram(longest=0), "longest must be .*got 0"),
        (lambda: transforms.dry(window=2.5), "window must be an integer, got 2.5"),
        (lambda: transforms.dry(breakers=0), "breakers must be .*got 0"),
        (lambda: transforms.bad_words(count=0), "count must be .*got 0"),
        (lambda: transforms.sequence_bias(length=0), "length must be .*got 0"),
        (lambda: transforms.forced_tokens(count=-1), "count must be .*got -1"),
        (lambda: transforms.exponential_decay_length([-2]), "end_tokens must be .*got -2"),
        (lambda: transforms.kgw_watermark(width=0), "width must be .*got 0"),
    ],
)
def test_sizes_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_page_lists_every_parameter_with_its_default():
    page = Path(__file__).parents[1] / "docs/guide/transforms_builtin.md"
    listed = {}
    for name, given in re.findall(r"^\| `(\w+)\(.*?\)` \| (.*?) \|", page.read_text(), re.M):
        listed[name] = dict(re.findall(r"`(\w+)` (\S+?)(?:,|$| )", given))
    assert listed.keys() == BUILT_IN.keys()
    for name, given in listed.items():
        defaults = built_in(name).params
        assert given.keys() == defaults.keys(), name
        for parameter, text in given.items():
            assert (np.asarray(defaults[parameter]) == float(text)).all(), parameter
