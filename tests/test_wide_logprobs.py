"""More logprobs than the usual programs report: as right as few, and nothing to neighbours."""

from __future__ import annotations

import numpy as np
import pytest

import jaxserve
from jaxserve.errors import InvalidRequestError
from tests.oracles.huggingface import Reference
from tests.prompts import SMALL

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {**SMALL, "max_total_tokens": 4096}
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
PROMPT = [7, 30, 200, 9, 411, 12, 5]


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(model):
    with jaxserve.Engine(model_path=model, **OPTIONS) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


def test_the_whole_vocabulary_equals_hugging_face(engine, model):
    reference = Reference(model)
    vocabulary = reference.model.config.vocab_size
    named = list(range(vocabulary))[::-1]
    result = engine.generate(
        input_ids=PROMPT, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0,
        top_logprobs_num=1000, token_ids_logprob=named,
    )  # fmt: skip
    meta = result["meta_info"]
    expected = reference.logprobs(PROMPT + result["output_ids"]).numpy()
    tops = meta["input_top_logprobs"][1:] + meta["output_top_logprobs"]
    by_id = meta["input_token_ids_logprobs"][1:] + meta["output_token_ids_logprobs"]
    assert len(tops) == len(by_id) == len(PROMPT) + 5
    for row, top, chosen in zip(expected, tops, by_id, strict=False):
        assert sorted(token for _, token, _ in top) == list(range(vocabulary))
        np.testing.assert_allclose([v for v, *_ in top], np.sort(row)[::-1], atol=1e-4)
        assert [token for _, token, _ in chosen] == named
        np.testing.assert_allclose([v for v, *_ in chosen], row[::-1], atol=1e-4)


@pytest.mark.parametrize("wide", [{"top_logprobs_num": 33}, {"token_ids_logprob": [3] * 129}])
def test_neighbours_of_a_wide_request_get_what_they_get_alone(engine, wide):
    def few(prompt, **sampling):
        return engine.generate(
            input_ids=prompt, sampling_params={**GREEDY, **sampling}, return_logprob=True,
            top_logprobs_num=2, token_ids_logprob=[4, 8], logprob_start_len=0,
        )  # fmt: skip

    drawn = {"temperature": 0.8, "sampling_seed": 5}
    prompts = [PROMPT, PROMPT[::-1]]
    alone = [few(prompts[0]), few(prompts[1], **drawn)]
    most = {"top_logprobs_num": 2, "token_ids_logprob": [4, 8], **wide}
    together = engine.generate(
        input_ids=[*prompts, [9] * 20],
        sampling_params=[GREEDY, {**GREEDY, **drawn}, GREEDY],
        return_logprob=True, logprob_start_len=0,
        top_logprobs_num=[2, 2, most["top_logprobs_num"]],
        token_ids_logprob=[[4, 8], [4, 8], most["token_ids_logprob"]],
    )  # fmt: skip
    for got, want in zip(together, alone, strict=False):
        assert got["output_ids"] == want["output_ids"]
        for key in ("input_top_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
            assert _numbers(got["meta_info"][key]) == pytest.approx(
                _numbers(want["meta_info"][key]), abs=1e-5
            )
    assert len(together[2]["meta_info"]["output_top_logprobs"][0]) == most["top_logprobs_num"]


def _numbers(positions):
    return [v for pairs in positions for pair in pairs or () for v in pair[:2]]


@pytest.mark.long
def test_a_wide_neighbour_is_bitwise_nothing_in_deterministic_mode(model):
    options = {**OPTIONS, "cuda_graph_bs": None, "enable_deterministic_inference": True}
    with jaxserve.Engine(model_path=model, **options) as engine:
        asked = {"return_logprob": True, "logprob_start_len": 0}
        alone = engine.generate(input_ids=[PROMPT], sampling_params=GREEDY, **asked)
        together = engine.generate(
            input_ids=[PROMPT, [9] * 20], sampling_params=GREEDY, top_logprobs_num=[0, 400], **asked
        )
        assert engine.get_server_info()["late_compiles"] == 0
    for key in ("input_token_logprobs", "output_token_logprobs"):
        assert together[0]["meta_info"][key] == alone[0]["meta_info"][key]


def test_bounds_name_themselves(engine):
    asked = {"input_ids": PROMPT, "return_logprob": True}
    with pytest.raises(InvalidRequestError, match=r"top_logprobs_num must be at most 1024.*1025"):
        engine.generate(**asked, top_logprobs_num=1025)
    with pytest.raises(InvalidRequestError, match=r"may have 4096 ids.*got 4097"):
        engine.generate(**asked, token_ids_logprob=[1] * 4097)
