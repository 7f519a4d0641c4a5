"""The sampler against plain NumPy written from docs/guide/sampling.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.output.logprobs import Columns
from jaxserve.sampler.fields import FLOATS, INTS
from jaxserve.sampler.sampler import Sampler
from jaxserve.sampler.state import RowParams, Sampled, SparseRows
from jaxserve.sampling_params import TOP_K_ALL

V = 97
TOP, NAMED, BIAS = 5, 3, 4
NEUTRAL = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "frequency": 0.0, "presence": 0.0,
    "repetition": 1.0, "top_k": TOP_K_ALL, "seed": 0, "sample_index": 0, "prompt_len": 0,
    "position_delta": 0, "num_bias": 0, "wants_logprob": 0, "num_top": 0, "num_named": NAMED,
}  # fmt: skip


def build(rows, counts=None, bias=(), named=None):
    """Device arrays for R slots whose parameters are `rows` (dicts over NEUTRAL), one more for
    padding. bias: {slot: [(id, value, until), ...]}."""
    rows = [NEUTRAL | row for row in rows] + [NEUTRAL]
    count = len(rows)
    floats = np.array([[row[name] for name in FLOATS.names] for row in rows], np.float32)
    ints = np.array([[row[name] for name in INTS.names] for row in rows], np.int64).astype(np.int32)
    lists = [np.zeros((count, BIAS), dtype) for dtype in (np.int32, np.float32, np.int32)]
    for slot, entries in dict(bias).items():
        ints[slot, INTS.names.index("num_bias")] = len(entries)
        for i, entry in enumerate(entries):
            for array, value in zip(lists, entry, strict=True):
                array[slot, i] = value
    ids = np.zeros((count, NAMED), np.int32) if named is None else named
    sparse = SparseRows(*map(jnp.asarray, lists), jnp.asarray(ids))
    counts = np.zeros((count, V), np.int32) if counts is None else counts
    sampled = Sampled(jnp.zeros(count, jnp.int32), jnp.asarray(counts))
    return sampled, RowParams(jnp.asarray(floats), jnp.asarray(ints)), sparse


def run(logits, rows, lengths=None, slots=None, raw=False, **lists):
    sampled, params, sparse = build(rows, **lists)
    slots = np.arange(len(rows)) if slots is None else slots
    lengths = np.zeros(len(rows) + 1) if lengths is None else lengths
    slots = jnp.asarray(slots, jnp.int32)
    positions = jnp.asarray(lengths, jnp.int32)[slots]
    logits = jnp.asarray(logits, jnp.float32)
    draw = jax.jit(Sampler(TOP, raw, None))
    carry, tokens, packed = draw(logits, sampled, slots, positions, params, sparse)
    return carry, tokens, Columns.of(np.asarray(packed))


def random_logits(rows, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * scale


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


def kept_by_sorting(logits, top_k, top_p, min_p):
    """The definition: sort, keep ranks below k and while the mass before is below p, ties in."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    by_k = logits[order[min(top_k, len(order)) - 1]]
    within = order[before < top_p] if top_p < 1 else order
    by_p = logits[within].min()
    return (logits >= max(by_k, by_p)) & (weights >= min_p)


def test_greedy_rows_take_the_argmax_in_any_company():
    logits = random_logits(4)
    rows = [{"top_k": 1}, {"seed": 3}, {"top_k": 1, "temperature": 0.3}, {"top_p": 0.2}]
    _, tokens, _ = run(logits, rows)
    assert [int(tokens[0]), int(tokens[2])] == list(logits[[0, 2]].argmax(-1))
    carry, alone, _ = run(logits, rows, slots=[0, 4, 2, 4])  # 4 is padding
    assert [int(alone[0]), int(alone[2])] == [int(tokens[0]), int(tokens[2])]
    assert int(carry.last_tokens[2]) == int(tokens[2])
    assert int(carry.counts[0, int(tokens[0])]) == 1


def test_frequencies_follow_the_filtered_distribution():
    """20,000 draws by position: a chi-square statistic far inside its 1e-6 quantile."""
    logits = random_logits(1, seed=5, scale=1.5)[0]
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": 12, "min_p": 0.02, "seed": 11}
    draws = 20_000
    sampled, row_params, sparse = build([params])

    rows = 500

    def draw(position):
        return Sampler(TOP, False, None)(
            jnp.tile(logits, (rows, 1)), sampled, jnp.zeros(rows, jnp.int32),
            position + jnp.arange(rows, dtype=jnp.int32), row_params, sparse,
        )[1]  # fmt: skip

    tokens = np.asarray(jax.lax.map(draw, jnp.arange(0, draws, rows, dtype=jnp.int32))).ravel()
    scaled = logits / np.float32(0.7)
    keep = kept_by_sorting(scaled, 12, 0.9, 0.02)
    p = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
    p /= p.sum()
    counts = np.bincount(tokens, minlength=V)
    assert not counts[~keep].any()
    statistic = np.sum((counts[keep] - draws * p[keep]) ** 2 / (draws * p[keep]))
    assert statistic < 60, (statistic, keep.sum())


def test_the_same_row_samples_the_same_in_any_batch_and_slot():
    logits = random_logits(3, seed=9)
    row = {"seed": 77, "sample_index": 2, "temperature": 0.9, "top_p": 0.8}
    _, alone, _ = run(logits[:1], [row], lengths=[13, 0])
    other = {"seed": 1}
    _, mixed, _ = run(
        logits[[1, 2, 0]], [other, row, other], lengths=[3, 13, 4, 0], slots=[0, 2, 1]
    )
    assert int(mixed[2]) == int(alone[0])


def test_penalties_count_generated_tokens():
    logits = random_logits(2, seed=2)
    counts = np.zeros((3, V), np.int32)
    counts[0, [3, 5]] = [2, 1]
    counts[1, 7] = 4
    rows = [
        {"top_k": 1, "frequency": 0.5, "presence": 0.25, "repetition": 1.3, "wants_logprob": 1},
        {"top_k": 1, "wants_logprob": 1},
    ]
    named = np.array([[3, 5, 9], [7, 8, 9], [0, 0, 0]], np.int32)
    carry, tokens, logprobs = run(logits, rows, counts=counts, named=named)
    expected = logits.astype(np.float64).copy()
    for token, count in ((3, 2), (5, 1)):
        x = expected[0, token] - 0.5 * count - 0.25
        expected[0, token] = x * 1.3 if x < 0 else x / 1.3
    for row in range(2):
        assert int(tokens[row]) == expected[row].argmax()
        np.testing.assert_allclose(
            logprobs.named[row], log_softmax(expected[row])[named[row]], atol=1e-4
        )
    assert int(carry.counts[1, int(tokens[1])]) == 1


def test_bias_and_masked_end_tokens_until_their_position():
    logits = random_logits(1, seed=4)
    best = int(logits[0].argmax())
    masked = {0: [(best, -np.inf, 10), (20, 50.0, 2**31 - 1)]}
    _, before, _ = run(logits, [{"top_k": 1}], lengths=[9, 0], bias=masked)
    assert int(before[0]) == 20
    only_mask = {0: [(best, -np.inf, 10)]}
    _, during, _ = run(logits, [{"top_k": 1}], lengths=[9, 0], bias=only_mask)
    _, after, _ = run(logits, [{"top_k": 1}], lengths=[10, 0], bias=only_mask)
    assert int(during[0]) == np.argsort(-logits[0])[1]
    assert int(after[0]) == best


@pytest.mark.parametrize("raw", [False, True])
def test_logprobs_are_after_temperature_unless_raw(raw):
    logits = random_logits(2, seed=6)
    rows = [
        {"temperature": 0.5, "seed": 1, "wants_logprob": 1, "num_top": TOP},
        {"top_k": 1, "temperature": 0.5, "wants_logprob": 1},
    ]
    _, tokens, logprobs = run(logits, rows, raw=raw)
    expected = log_softmax(logits[0] if raw else logits[0] / 0.5)
    np.testing.assert_allclose(logprobs.chosen[0], expected[int(tokens[0])], atol=1e-4)
    np.testing.assert_array_equal(logprobs.top_ids[0], np.argsort(-logits[0])[:TOP])
    np.testing.assert_allclose(logprobs.top_values[0], np.sort(expected)[::-1][:TOP], atol=1e-4)
    np.testing.assert_allclose(
        logprobs.chosen[1], log_softmax(logits[1])[int(tokens[1])], atol=1e-4
    )


def test_bad_logits_stay_inside_the_vocabulary():
    logits = random_logits(2)
    logits[0, :] = np.nan
    logits[1, 5] = np.inf
    _, tokens, logprobs = run(
        logits, [{"seed": 1, "wants_logprob": 1}, {"top_k": 1, "wants_logprob": 1}]
    )
    assert 0 <= int(tokens[0]) < V
    assert int(tokens[1]) == 5
    assert np.isfinite(np.asarray(logprobs.chosen)).all()
