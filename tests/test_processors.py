"""Logit processors on the host: SGLang's own by name, and users'."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import jaxserve
from jaxserve.processors import builtin
from tests.prompts import ids
from tests.test_chains import OPTIONS, VOCAB, text

pytestmark = pytest.mark.usefixtures("kept_programs")

START, END, LINE = 400, 401, 402
GREEDY = {"temperature": 0, "max_new_tokens": 14, "ignore_eos": True}


class Counts(jaxserve.CustomLogitProcessor):
    """Each token is one more than the last, from `first` on."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logits, custom_param_list=None):
        (params,) = custom_param_list
        request = params["__req__"]
        assert self.calls == len(request.output_ids) and request.origin_input_ids
        self.calls += 1
        logits[...] = -np.inf
        logits[0, params["first"] + len(request.output_ids)] = 1
        return logits


class Thinks(builtin.ThinkingBudgetLogitProcessor):
    THINKING_START_TOKEN_ID, THINKING_END_TOKEN_ID, NEW_LINE_TOKEN_ID = START, END, LINE


@pytest.fixture(scope="module")
def engine(tiny_models):
    options = {**OPTIONS, "enable_custom_logit_processor": True}
    with jaxserve.Engine(tiny_models("llama"), **options) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


@pytest.mark.parametrize("form", ["class", "object", "string"])
def test_a_users_own(engine, form):
    """For some prompts of a batch."""
    given = {"class": Counts, "object": Counts(), "string": Counts.to_str()}[form]
    prompts = [text(seed, 8 + seed) for seed in range(3)]
    free = engine.generate(input_ids=prompts[1], sampling_params=GREEDY)["output_ids"]
    params = [{**GREEDY, "custom_params": {"first": 30}}, GREEDY, {**GREEDY, "max_new_tokens": 2}]
    found = engine.generate(
        input_ids=prompts, sampling_params=params, custom_logit_processor=[given, None, None]
    )
    assert found[0]["output_ids"] == list(range(30, 44))
    assert found[1]["output_ids"] == free
    assert len(found[2]["output_ids"]) == 2


def test_disallowed_tokens(engine):
    prompt = text(4, 12)
    plain = engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    params = {**GREEDY, "custom_params": {"token_ids": plain[:2]}}
    found = engine.generate(
        input_ids=prompt,
        sampling_params=params,
        custom_logit_processor=builtin.DisallowedTokensLogitsProcessor,
    )
    assert not set(found["output_ids"]) & set(plain[:2])
    bias = {**GREEDY, "logit_bias": dict.fromkeys(map(str, plain[:2]), -1e9)}
    again = engine.generate(input_ids=prompt, sampling_params=bias)
    assert found["output_ids"] == again["output_ids"]


@pytest.mark.parametrize("budget", [0, 5, None])
def test_a_budget_for_thinking(engine, budget):
    prompt = [*text(5, 9), START, 7]
    params = {**GREEDY, "custom_params": {"thinking_budget": budget}}
    params["logit_bias"] = {str(END): -1e9}
    found = engine.generate(input_ids=prompt, sampling_params=params, custom_logit_processor=Thinks)
    if budget is None:
        assert END not in found["output_ids"]
    else:
        thought = max(budget - 1, 0)
        assert found["output_ids"][thought : thought + 2] == [LINE, END]


def test_no_ngram_twice_in_a_window(engine):
    prompt = [11, 12, 13] * 5
    params = {**GREEDY, "logit_bias": {"11": 50.0, "12": 50.0, "13": 50.0}, "max_new_tokens": 25}
    plain = engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    given = {"ngram_size": 2, "window_size": 8, "whitelist_token_ids": [13]}
    found = engine.generate(
        input_ids=prompt,
        sampling_params={**params, "custom_params": given},
        custom_logit_processor=builtin.DeepseekOCRNoRepeatNGramLogitProcessor,
    )["output_ids"]

    def repeats(tokens):
        whole = [*prompt, *tokens]
        for place in range(len(prompt), len(whole)):
            window = whole[max(place - 8, 0) : place]
            pairs = {*itertools.pairwise(window)}
            if whole[place] != 13 and (whole[place - 1], whole[place]) in pairs:
                return True
        return False

    assert repeats(plain) and not repeats(found)


def returns(value):
    return lambda logits, params: value


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, jaxserve.InvalidRequestError, "custom_logit_processor must be a CustomLogitProcessor"),
        ("{}", jaxserve.InvalidRequestError, r"is no string of CustomLogitProcessor.to_str\(\)"),
        (returns(None), jaxserve.RequestFailedError, r"returned object\[\], expected float32\[1, "),
        (returns(np.zeros((2, VOCAB))), jaxserve.RequestFailedError, r"float64\[2, 512\]"),
    ],
    ids=range(4),
)
def test_what_is_none(engine, given, error, message):
    with pytest.raises(error, match=message):
        engine.generate(input_ids=[3], sampling_params=GREEDY, custom_logit_processor=given)


def test_custom_params_without_a_processor(engine):
    params = {**GREEDY, "custom_params": {"a": 1}}
    with pytest.raises(jaxserve.InvalidRequestError, match="no custom_logit_processor is given"):
        engine.generate(input_ids=[3], sampling_params=params)


def test_a_string_needs_the_option(tiny_models):
    with (
        jaxserve.Engine(tiny_models("llama"), **OPTIONS) as engine,
        pytest.raises(jaxserve.InvalidRequestError, match="enable_custom_logit_processor=True"),
    ):
        text_of = Counts.to_str()
        engine.generate(input_ids=[[3], [4]], custom_logit_processor=text_of)


def test_programs_for_sglang_find_theirs(engine):
    from jaxserve import sglang_alias

    sglang_alias.install()
    try:
        from sglang.srt.sampling.custom_logit_processor import (  # pyright: ignore
            DisallowedTokensLogitsProcessor,
        )

        params = {**GREEDY, "custom_params": {"token_ids": list(range(VOCAB - 3))}}
        found = engine.generate(
            input_ids=[[5, 6], [7]],
            sampling_params=params,
            custom_logit_processor=DisallowedTokensLogitsProcessor().to_str(),
        )
    finally:
        sglang_alias.uninstall()
    assert {token for tokens in ids(found) for token in tokens} <= set(range(VOCAB - 3, VOCAB))
