"""Beam search against transformers'."""

from __future__ import annotations

import gc

import pytest
import torch

import jaxserve
from jaxserve.decoding import beam_search
from tests.marks import long
from tests.oracles.huggingface import Reference
from tests.test_lab import OPTIONS, text

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")


@pytest.fixture(scope="module")
def both(tiny_models):
    """A laboratory and transformers' model."""
    folder = tiny_models("llama")
    with jaxserve.Engine(folder, **OPTIONS) as engine, engine.lab(max_tokens=512) as lab:
        yield lab, Reference(folder).model
        gc.collect()
        assert lab.available_tokens == 512


def check(lab, model, prompt, width, count, ends, **options):
    """Tokens and scores are transformers'."""
    found = beam_search(lab, prompt, width, count, end_tokens=ends, **options)
    expected = model.generate(
        torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False,
        max_new_tokens=count, min_new_tokens=None, eos_token_id=ends or None, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    scores = expected.sequences_scores.tolist()
    assert [each.score for each in found] == pytest.approx(scores, abs=2e-4)
    for beam, sequence in zip(found, expected.sequences.tolist(), strict=True):
        made, rest = sequence[len(prompt) :], sequence[len(prompt) + len(beam.tokens) :]
        assert beam.tokens == made[: len(beam.tokens)] and set(rest) <= {0, *ends}
    return found


CASES = [
    (2, {}),
    (4, {"length_penalty": 0.0, "early_stopping": "never"}),
    (4, {"length_penalty": 0.5, "early_stopping": True}),
    long(3, {"length_penalty": 2.0, "early_stopping": "never"}),
    long(8, {"length_penalty": -1.0, "early_stopping": False}),
]


@pytest.mark.parametrize(("width", "options"), CASES, ids=str)
def test_tokens_and_scores_are_those_of_transformers(both, width, options):
    lengths = set()
    for seed in range(4):
        prompt = text(40 + seed, 5 + 6 * seed)
        plain = check(*both, prompt, width, 12, [], **options)
        assert all(len(beam.tokens) == 12 for beam in plain)
        # tokens that beams meet on their way end them now
        ends = sorted({beam.tokens[2] for beam in plain})
        ended = check(*both, prompt, width, 12, ends, **options)
        lengths |= {len(beam.tokens) for beam in ended}
    assert min(lengths) < 12 or options.get("length_penalty", 1) > 1
