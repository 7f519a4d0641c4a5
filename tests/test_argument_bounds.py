"""What is too large, endless or too deep is refused at once, by an error that is short; numbers are
checked as the float32 that they become."""

from __future__ import annotations

import asyncio
import itertools
import time
import tracemalloc

import numpy as np
import pytest

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, JaxserveError, UnknownOptionError
from jaxserve.sampling_params import SamplingParams
from tests.api_fakes import Fakes, byte_level_tokenizer, loop_of

TOKENIZER = byte_level_tokenizer()
SHORT = {"max_new_tokens": 2}
SECONDS = 2.0
"""On a loaded machine; building what is refused would take ten times as long."""


@pytest.fixture(scope="module")
def fakes():
    with pytest.MonkeyPatch.context() as patch:
        fakes = Fakes(TOKENIZER, patch)
        yield fakes
        fakes.close()


@pytest.fixture(scope="module")
def engine(fakes):
    return fakes.engine()


def refused(call, *fragments, kind=InvalidRequestError):
    started = time.perf_counter()
    with pytest.raises(kind) as caught:
        call()
    assert time.perf_counter() - started < SECONDS
    message = str(caught.value)
    assert len(message) < 10_000
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("prompts", "n"), [(1, 60_000), (3, 2), (5, 1), (1000, 60)], ids=lambda value: str(value)
)
def test_more_requests_than_may_wait(fakes, prompts, n):
    engine = fakes.engine(max_queued_requests=4)
    before = len(loop_of(engine).submitted)
    tracemalloc.start()
    refused(
        lambda: engine.generate(["a"] * prompts, {**SHORT, "n": n}),
        "max_queued_requests=4", f"{prompts * n} requests",
    )  # fmt: skip
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert len(loop_of(engine).submitted) == before
    assert len(engine.generate(["a", "b"], {**SHORT, "n": 2})) == 4


def test_more_samples_or_requests_than_a_call_may_have(engine):
    refused(lambda: engine.generate("a", {"n": 1_000_000}), "n must be in [1, 65536]", "1000000")
    refused(lambda: engine.generate("a", {"n": 10**5000}), "n must be in [1, 65536]")
    refused(lambda: engine.generate(["a"] * 100, {"n": 65_536}), "1048576 requests", "6553600")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("stop_token_ids", itertools.count(), "may have 262144 ids"),
        ("stop_token_ids", (0 for _ in itertools.repeat(0)), "may have 262144 ids"),
        ("stop_token_ids", range(10**12), "may have 262144 ids"),
        ("stop", ["x"] * 10**6, "may have 1024 strings"),
        ("stop", "x" * 10**7, "may have 65536 characters"),
        ("stop_regex", ["x"] * 2000, "may have 1024 strings"),
        ("stop", itertools.repeat("x"), "must be a string or a list of strings"),
        ("stop", ["a", "\ud800"], "surrogate"),
        ("logit_bias", dict.fromkeys(range(300_000), 1.0), "may have 262144 entries"),
        ("logit_bias", {"9" * 10_000: 1}, "no token id"),
        ("top_k", -(10**5000), "top_k must be"),
        ("min_new_tokens", 10**5000, "min_new_tokens must be"),
        ("max_new_tokens", 10**5000, "max_new_tokens="),
        ("stop_token_ids", [10**5000, "x"], "stop_token_ids must be an integer"),
        ("temperature", ["x" * 10**7], "temperature must be a number"),
        ("ebnf", [["x"] * 10**6], "ebnf must be a string"),
    ],
    ids=range(16),
)
def test_sampling_parameters(engine, key, value, fragment):
    refused(lambda: engine.generate("a", {key: value}), fragment)


def deep(levels=100_000):
    value = []
    for _ in range(levels):
        value = [value]
    return value


ENDLESS: list = []
ENDLESS += [ENDLESS, ENDLESS]


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": deep()},
        {"input_ids": ENDLESS},
        {"input_ids": [[5], ENDLESS]},
        {"input_ids": [10**5000]},
        {"input_ids": itertools.count()},
        {"input_ids": np.zeros((2, 2, 2), int)},
        {"prompt": deep()},
        {"prompt": itertools.repeat("a")},
        {"prompt": ["a", "\ud800"]},
        {"prompt": "a", "rid": "x" * 10**7},
        {"prompt": "a", "rid": itertools.repeat("a")},
        {"prompt": ["a", "b"], "rid": ["x"] * 10**6},
        {"prompt": "a", "rid": "\ud800"},
        {"prompt": "a", "cache_salt": "x" * 10**7},
        {"prompt": ["a", "b"], "cache_salt": ["a", "\ud800"]},
        {"prompt": "a", "priority": "x" * 10**7},
        {"prompt": "a", "stream": ENDLESS},
        {"prompt": "a", "return_logprob": True, "top_logprobs_num": 10**5000},
        {"prompt": "a", "return_logprob": True, "logprob_start_len": 10**5000},
        {"prompt": "a", "return_logprob": True, "token_ids_logprob": [10**5000]},
        {"prompt": "a", "return_logprob": True, "token_ids_logprob": ENDLESS},
        {"prompt": "a", "return_logprob": True, "token_ids_logprob": itertools.count()},
        {"prompt": "a", "image_data": ENDLESS},
        {"prompt": "a", "lora_path": deep()},
        {"prompt": "a", "sampling_params": deep()},
        {"prompt": "a", "sampling_params": [SHORT] * 10**6},
    ],
    ids=range(26),
)
def test_arguments(engine, arguments):
    refused(lambda: engine.generate(**arguments), kind=JaxserveError)
    refused(lambda: asyncio.run(engine.async_generate(**arguments)), kind=JaxserveError)
    refused(lambda: engine.generate(**{"stream": True, **arguments}), kind=JaxserveError)


def test_errors_name_the_row(engine):
    for arguments, fragment in (
        ({"prompt": ["a", "\ud800"]}, "prompt 1 of the batch"),
        ({"prompt": ["a", "b"], "rid": ["a", "\ud800"]}, "rid[1]"),
        ({"prompt": ["a", "b"], "cache_salt": ["a", 3]}, "cache_salt[1]"),
        ({"input_ids": [[5], [6, [7]]]}, "input_ids[1]"),
        ({"prompt": ["a", "b"], "sampling_params": [SHORT, {"n": 10**400}]}, "row 1"),
    ):
        refused(lambda arguments=arguments: engine.generate(**arguments), fragment)


def test_control_methods(engine):
    for value in (3, b"x", ENDLESS, object()):
        refused(lambda value=value: engine.abort_request(value), "rid must be a string")
        refused(lambda value=value: engine.abort_request("x", value), "abort_all must be")
    for name, value in (
        ("output_dir", "\0"), ("output_dir", "\ud800"), ("output_dir", "x" * 10**6),
        ("output_dir", np.array(["a", "b"])), ("profile_id", "x" * 10**6), ("profile_id", "a/b"),
        ("num_steps", 10**5000 * -1), ("activities", ENDLESS), ("with_stack", "x" * 10**7),
    ):  # fmt: skip
        refused(lambda name=name, value=value: engine.start_profile(**{name: value}), name)


def test_names_of_any_length(engine):
    refused(lambda: engine.generate("a", **{"x" * 10**7: 1}), kind=UnknownOptionError)
    refused(lambda: engine.generate("a", {"x" * 10**7: 1}), kind=UnknownOptionError)
    refused(lambda: engine.generate("a", {10**5000: 1}), kind=UnknownOptionError)


class Loud:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**8, b"x" * 10**8, 10**10**6, [0] * 10**7, ENDLESS, deep(), Loud(), [Loud()],
     {"a": "x" * 10**7}, set(range(10**6)), np.array(["x" * 10**6])],
    ids=range(11),
)  # fmt: skip
def test_values_in_messages_are_short_and_made_at_once(value):
    started = time.perf_counter()
    text = checks.shown(value)
    assert time.perf_counter() - started < SECONDS / 4
    assert len(text) < 200 and type(value).__name__ in text


def test_values_in_messages_are_as_python_writes_them():
    for value in ("it's", [1, "a", (2,)], {"a": 1}, None, 1.5, (), np.int64(3), {3}):
        assert checks.shown(value) == f"{value!r} ({type(value).__name__})"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 1e39),
        ("temperature", 3.41e38),
        ("temperature", 10**400),
        ("temperature", float("inf")),
        ("logit_bias", {3: 3.5e38}),
        ("logit_bias", {3: -1e39}),
        ("logit_bias", {3: 10**400}),
        ("repetition_penalty", 10**400),
        ("min_p", -(10**400)),
        ("frequency_penalty", np.float64(1e300)),
    ],
    ids=range(10),
)
def test_numbers_that_float32_does_not_have(key, value):
    with pytest.raises(InvalidRequestError, match=rf"{key}.* must be finite in float32"):
        SamplingParams.from_dict({key: value})


def test_the_largest_numbers_of_float32_are_taken():
    largest = float(np.finfo(np.float32).max)
    assert SamplingParams.from_dict({"temperature": largest}).temperature == largest
    assert SamplingParams.from_dict({"logit_bias": {3: -largest}}).logit_bias == {3: -largest}


@pytest.mark.parametrize("value", [1e-38, 1e-46, 5e-324])
def test_numbers_that_float32_flushes(value):
    tiny = float(np.finfo(np.float32).tiny)
    params = SamplingParams.from_dict(
        {"top_p": value, "min_p": value, "repetition_penalty": value, "logit_bias": {3: -value}}
    )
    assert (params.top_p, params.repetition_penalty) == (tiny, tiny)
    assert (params.min_p, params.logit_bias) == (0.0, {3: 0.0})
    assert SamplingParams.from_dict({"temperature": value}).top_k == 1
