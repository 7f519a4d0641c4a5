"""sample: how often each token is drawn, against the exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import SampleRows
from pallas_kernels.sample import cases
from pallas_kernels.sample import reference as plain
from tests.kernels.draws import SMALL, draw
from tests.kernels.support import ON_GPU, needs_gpu, quiet

pytestmark = [quiet, pytest.mark.usefixtures("optimized")]
interpreted = pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")

SETTINGS = (
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 7},
    {"top_p": 0.8},
    {"top_p": 0.3, "temperature": 1.3},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.02},
    {"frequency": 0.4, "presence": 0.3, "repetition": 1.2, "top_p": 0.9},
    {"num_bias": 5, "top_k": 30},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 40},
)
VOCAB, ROWS = 60, 1000


def frequencies(name, setting, calls, rows, sizes=()):
    """(counts of the tokens drawn, exact probabilities): one row of logits, the seed and the
    position vary."""
    case = cases.Case("one", 1, VOCAB, scale=1.5)
    logits, _, slots = case.inputs(11)
    slots.bias_until[...] = cases.LIVE_FOREVER
    one = cases.row_params([{**setting, "slot": 0, "position": 20}])
    first = SampleRows(*(array[0] for array in one))
    x = plain.scaled(plain.processed(logits[0], first, slots), first.temperature)
    p = np.where(
        plain.keep_mask(x, first.top_k, first.top_p, first.min_p), plain.probabilities(x), 0.0
    )
    many = SampleRows(*(np.repeat(array, rows) for array in one))
    tokens = []
    for call in range(calls):
        seeds = np.arange(rows, dtype=np.int32) % 10
        positions = 20 + call * rows + np.arange(rows, dtype=np.int32)
        batch = np.repeat(logits, rows, 0), many._replace(seed=seeds, position=positions), slots
        tokens.append(draw(name, case, batch, sizes=sizes).tokens)
    return np.bincount(np.concatenate(tokens), minlength=VOCAB), p / p.sum()


def assert_drawn_from(counts, p):
    assert not counts[p == 0].any()
    expected = counts.sum() * p
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = np.sum((observed - expected) ** 2 / expected)
    degrees = max(1, len(expected) - 1)
    # five standard deviations of a chi-square
    assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 5, (statistic, degrees)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies_xla(setting):
    assert_drawn_from(*frequencies("xla", setting, 40, ROWS))


@interpreted
@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies_triton(setting):
    assert_drawn_from(*frequencies("triton", setting, 20, 200, SMALL))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (0, 6, 7)], ids=str)
def test_frequencies_on_device(setting):
    assert_drawn_from(*frequencies("triton", setting, 100, ROWS))
