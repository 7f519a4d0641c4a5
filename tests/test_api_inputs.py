"""What calls are refused, and what requests the others become."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.output.logprobs import LogprobSpec
from tests.api_fakes import EOS, Fakes, byte_level_tokenizer, loop_of

TOKENIZER = byte_level_tokenizer()
VOCAB = len(TOKENIZER)


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes(TOKENIZER, monkeypatch)
    yield fakes
    fakes.close()


@pytest.fixture
def engine(fakes):
    return fakes.engine(context_length=64, max_total_tokens=1000)


def requests(engine, *args, **kwargs):
    """The requests that a call submits."""
    loop = loop_of(engine)
    del loop.submitted[:]
    engine.generate(*args, **kwargs)
    return list(loop.submitted)


def request(engine, *args, **kwargs):
    (only,) = requests(engine, *args, **kwargs)
    return only


SHORT = {"max_new_tokens": 2}


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        ({}, "both None"),
        ({"prompt": "a", "input_ids": [[1]]}, "differ in shape"),
        ({"prompt": ["a", "b"], "input_ids": [[1]]}, "a list of 2, input_ids is a list of 1"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ["a", ""]}, "prompt 1 of the batch is empty"),
        ({"prompt": ["a", 5]}, "prompt 1 of the batch must be a string, got 5"),
        ({"prompt": 5}, "prompt must be"),
        ({"prompt": {"a": 1}}, "prompt must be"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [[1], []]}, r"input_ids\[1\] is empty"),
        ({"input_ids": "abc"}, "input_ids must be"),
        ({"input_ids": [1, VOCAB]}, f"{VOCAB}, which is outside the vocabulary"),
        ({"input_ids": [1, -1]}, "-1, which is outside the vocabulary"),
        ({"input_ids": [[1], [2, 10**6]]}, r"input_ids\[1\] contains 1000000"),
        ({"input_ids": [10**30]}, "input_ids must be a list of integers"),
        ({"input_ids": [1.5]}, "input_ids must be a list of integers"),
        ({"input_ids": [True]}, "input_ids must be a list of integers"),
        ({"input_ids": ["1"]}, "input_ids must be a list of integers"),
        ({"input_ids": [[1], 2]}, r"input_ids\[1\] must be a list"),
        ({"input_ids": [[1, [2]]]}, r"input_ids\[0\] must be a list of integers"),
        ({"input_ids": [1] * 64}, "is longer than the model's context length"),
        ({"prompt": ["a"], "sampling_params": [{}, {}]}, "sampling_params has 2 entries for 1"),
        ({"prompt": ["a", "b"], "sampling_params": [{}]}, "sampling_params has 1 entries for 2"),
        (
            {"prompt": ["a", "b"], "sampling_params": [{}, {"top_p": 2.0}]},
            r"row 1 of the batch: top_p .*2\.0",
        ),
        (
            {"prompt": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
            "parallel_sample_num should be the same",
        ),
        ({"prompt": "a", "sampling_params": 5}, "sampling_params must be a dict"),
        ({"prompt": "a", "sampling_params": {"max_new_tokens": 64}}, "max_new_tokens=64"),
        ({"prompt": "a", "sampling_params": {"stop_regex": "("}}, r"stop_regex '\('"),
        ({"prompt": "a", "sampling_params": {"logit_bias": {VOCAB: 1.0}}}, f"id {VOCAB}, which"),
        (
            {"prompt": "a", "sampling_params": {"logit_bias": dict.fromkeys(range(65), 1.0)}},
            "logit_bias has 65 entries",
        ),
        ({"prompt": "a", "return_logprob": 1}, "return_logprob must be True or False"),
        ({"prompt": ["a"], "return_logprob": [True, False]}, "return_logprob has 2 entries"),
        ({"prompt": "a", "logprob_start_len": -2}, "logprob_start_len must be at least -1"),
        (
            {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 3},
            "logprob_start_len must not exceed the prompt's 2 tokens, got 3",
        ),
        ({"prompt": "a", "top_logprobs_num": -1}, "top_logprobs_num must be at least 0"),
        ({"prompt": "a", "top_logprobs_num": 9}, "top_logprobs_num must be at most 8"),
        ({"prompt": "a", "token_ids_logprob": 5}, "flat list of integers"),
        ({"prompt": "a", "token_ids_logprob": [[1]]}, "flat list of integers"),
        ({"prompt": ["a"], "token_ids_logprob": [[1, [2]]]}, "flat list of integers"),
        ({"prompt": "a", "token_ids_logprob": [1.5]}, "flat list of integers"),
        ({"prompt": "a", "token_ids_logprob": [VOCAB]}, "out-of-vocabulary"),
        ({"prompt": "a", "token_ids_logprob": [-1]}, "out-of-vocabulary"),
        ({"prompt": "a", "token_ids_logprob": [1] * 7}, "may have 6 ids"),
        ({"prompt": ["a", "b"], "token_ids_logprob": [[1]]}, "token_ids_logprob has 1 entries"),
        (
            {"prompt": ["a"], "sampling_params": {"n": 2}, "return_logprob": [True]},
            "return_logprob must not be a list of values when n > 1",
        ),
        ({"prompt": ["a", "b"], "rid": ["x"]}, "rid has 1 entries for 2 prompts"),
        ({"prompt": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request ID"),
        ({"prompt": "a", "rid": 5}, "rid must be"),
        ({"prompt": "a", "rid": ""}, "rid must be a non-empty string"),
        ({"prompt": "a", "stream": "yes"}, "stream must be True or False"),
        ({"prompt": "a", "stream": True, "progress": True}, "progress=True"),
        ({"prompt": "a", "routed_dp_rank": 1}, "routed_dp_rank"),
    ],
)
def test_bad_calls_are_refused_whole_and_the_engine_goes_on(engine, call, fragment):
    with pytest.raises(ValueError, match=fragment) as caught:
        engine.generate(**call)
    assert isinstance(caught.value, InvalidRequestError)
    assert loop_of(engine).submitted == []
    assert engine.generate("a", SHORT)["output_ids"]


def test_one_bad_row_of_eight_submits_none(engine):
    prompts = ["a"] * 8
    rows = [{"temperature": 1.0}] * 7 + [{"temperature": -1.0}]
    with pytest.raises(ValueError, match="row 7 of the batch: temperature"):
        engine.generate(prompts, rows)
    with pytest.raises(ValueError, match=r"input_ids\[3\]"):
        engine.generate(input_ids=[[1]] * 3 + [[VOCAB]] + [[1]] * 4)
    with pytest.raises(ValueError, match="row 5 of the batch: The prompt"):
        engine.generate(input_ids=[[1]] * 5 + [[1] * 64] + [[1]] * 2)
    assert loop_of(engine).submitted == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio_data", ["x"]),
        ("video_data", b""),
        ("mm_hashes", ["h"]),
        ("lora_path", "adapter"),
        ("lora_path", [None, "adapter"]),
        ("return_routed_experts", True),
        ("require_reasoning", True),
        ("session_params", {"id": "s"}),
        ("session_id", "s"),
        ("bootstrap_host", "h"),
        ("bootstrap_port", 1),
        ("bootstrap_room", 0),
        ("disagg_prefill_dp_rank", 0),
    ],
)
def test_unsupported_arguments_say_so(engine, name, value):
    with pytest.raises(NotSupportedError, match=rf"'{name}'.*not supported yet"):
        engine.generate("a", SHORT, **{name: value})
    assert engine.generate("a", SHORT, **{name: None})["output_ids"]


def test_arguments_without_effect_and_unknown_ones(engine):
    engine.generate(
        "a",
        SHORT,
        external_trace_header={"a": "b"},
        routed_dp_rank=0,
        routed_experts_start_len=0,
        image_data=None,
    )
    with pytest.raises(TypeError, match=r"'return_logprobs'.*'return_logprob'") as caught:
        engine.generate("a", SHORT, return_logprobs=True)
    assert isinstance(caught.value, UnknownOptionError)


def test_priority_and_cache_salt(engine, fakes):
    given = requests(engine, ["a", "b"], {"n": 2, **SHORT}, priority=3, cache_salt=["x", None])
    expected = [(3, "salt=1:x;")] * 2 + [(3, "")] * 2
    assert [(each.priority, each.namespace) for each in given] == expected
    assert (request(engine, "a", SHORT).priority, request(engine, "a", SHORT).namespace) == (
        None, "",
    )  # fmt: skip
    assert request(engine, "a", SHORT, cache_salt="y").namespace == "salt=1:y;"
    for name, value in (("priority", "high"), ("priority", 1.5), ("priority", [1])):
        with pytest.raises(ValueError, match="priority must be an integer"):
            engine.generate("a", SHORT, **{name: value})
    with pytest.raises(ValueError, match=r"cache_salt must be a string.*got 3"):
        engine.generate("a", SHORT, cache_salt=3)
    with pytest.raises(ValueError, match=r"cache_salt has 1 entries for 2 prompts"):
        engine.generate(["a", "b"], SHORT, cache_salt=["x"])
    strict = fakes.engine(abort_on_priority_when_disabled=True)
    with pytest.raises(ValueError, match=r"priority=3 needs .*enable_priority_scheduling"):
        strict.generate("a", SHORT, priority=3)
    assert strict.generate("a", SHORT)["output_ids"]


def test_prompts_and_ids(engine):
    assert requests(engine, []) == [] and engine.generate([]) == []
    assert list(engine.generate([], stream=True)) == []
    text = "The capital"
    assert request(engine, text, SHORT).prompt_ids == TOKENIZER(text)["input_ids"]
    for ids in ([1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint8)):
        assert request(engine, input_ids=ids, sampling_params=SHORT).prompt_ids == [1, 2]
    for ids in ([[1], [2]], np.array([[1], [2]]), [np.array([1]), (2,)]):
        both = requests(engine, input_ids=ids, sampling_params=SHORT)
        assert [each.prompt_ids for each in both] == [[1], [2]]
    assert all(type(token) is int for token in both[0].prompt_ids)


def test_without_a_tokenizer(fakes):
    engine = fakes.engine(skip_tokenizer_init=True, eos_ids=[7])
    with pytest.raises(ValueError, match="prompt needs a tokenizer"):
        engine.generate("a")
    for name, value in (("stop", "x"), ("stop_regex", "x")):
        with pytest.raises(ValueError, match=rf"{name}=.* needs a tokenizer"):
            engine.generate(input_ids=[1], sampling_params={name: value})
    given = request(engine, input_ids=[1], sampling_params={"max_new_tokens": 2})
    assert given.stop_ids == {7} and given.stop_matcher is None


@pytest.mark.parametrize(
    ("prompt", "params", "expected"),
    [
        (4, {}, 60),  # the implicit 128, clipped to the context
        (4, {"max_new_tokens": 60}, 60),
        (4, {"max_new_tokens": None}, 60),
        (63, {"max_new_tokens": 1}, 1),
        (63, None, 1),
        (4, {"max_new_tokens": 0}, 0),
    ],
)
def test_lengths_within_the_context(engine, prompt, params, expected):
    given = request(engine, input_ids=[1] * prompt, sampling_params=params)
    assert given.max_new_tokens == given.params.max_new_tokens == expected


def test_an_explicit_length_that_overflows_is_refused_an_implicit_one_clipped(fakes):
    engine = fakes.engine(context_length=64, preferred_sampling_params={"max_new_tokens": 100})
    for params in ({"max_new_tokens": 61}, {"max_new_tokens": 128}):
        with pytest.raises(ValueError, match=r"max_new_tokens.*context length"):
            engine.generate(input_ids=[1] * 4, sampling_params=params)
    # The engine's own preference is a wish, like the built-in 128.
    assert request(engine, input_ids=[1] * 4).max_new_tokens == 60


def test_lengths_beyond_the_pool(fakes):
    engine = fakes.engine(context_length=64, max_total_tokens=32)
    assert request(engine, input_ids=[1] * 10, sampling_params={"max_new_tokens": 54}) and True
    given = request(engine, input_ids=[1] * 10, sampling_params={"max_new_tokens": 54})
    assert given.max_new_tokens == 22
    with pytest.raises(ValueError, match="can never fit the KV cache, which holds 32 tokens"):
        engine.generate(input_ids=[1] * 32, sampling_params={"max_new_tokens": 1})
    zero = request(engine, input_ids=[1] * 32, sampling_params={"max_new_tokens": 0})
    assert zero.max_new_tokens == 0


def test_auto_truncation(fakes):
    engine = fakes.engine(context_length=64, allow_auto_truncate=True)
    ids = [i % VOCAB for i in range(100)]
    with pytest.warns(UserWarning, match="longer than the model's context length"):
        given = request(engine, input_ids=ids, sampling_params={"max_new_tokens": 50})
    assert given.prompt_ids == ids[:63] and given.max_new_tokens == 1
    clipped = request(engine, input_ids=[1] * 10, sampling_params={"max_new_tokens": 100})
    assert clipped.max_new_tokens == 54


def test_stop_tokens(fakes):
    engine = fakes.engine(eos_ids=[9])
    eos = TOKENIZER.eos_token_id
    plain = request(engine, "a", SHORT)
    assert plain.stop_ids == {9, eos} and plain.masked_ids == ()
    own = {**SHORT, "stop_token_ids": [5, 10**6]}
    assert request(engine, "a", own).stop_ids == {5, 9, eos}
    # ignore_eos ignores the end of text, not the caller's own stops.
    assert request(engine, "a", {**own, "ignore_eos": True}).stop_ids == {5}
    minimal = request(engine, "a", {**own, "min_new_tokens": 1})
    assert minimal.masked_ids == tuple(sorted({5, 9, eos}))
    clamped = {"min_new_tokens": 100, "stop_token_ids": [5]}
    assert request(engine, input_ids=[1] * 500, sampling_params=clamped).params.min_new_tokens == 12


def test_extra_stop_tokens_of_the_tokenizer(monkeypatch):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    fakes = Fakes(tokenizer, monkeypatch)
    given = request(fakes.engine(), "a", SHORT)
    fakes.close()
    assert given.stop_ids == set(tokenizer.convert_tokens_to_ids([EOS, "<|eom_id|>"]))


def test_samples_of_a_prompt_are_a_group(engine):
    rows = requests(engine, ["a", "b"], {**SHORT, "n": 3})
    assert [row.index for row in rows] == list(range(6))
    assert [row.sample_index for row in rows] == [0, 1, 2, 0, 1, 2]
    assert [len({row.group for row in part}) for part in (rows[:3], rows[3:])] == [1, 1]
    assert rows[0].group and rows[0].group != rows[3].group
    assert len({row.seed for row in rows[:3]}) == 1 and rows[0].seed != rows[3].seed
    assert len({row.rid for row in rows}) == 6
    assert request(engine, "a", SHORT).group == ""


def test_request_ids(engine):
    assert request(engine, "a", SHORT, rid="me").rid == "me"
    assert [r.rid for r in requests(engine, ["a", "b"], SHORT, rid="me")] == ["me_0", "me_1"]
    named = requests(engine, ["a", "b"], SHORT, rid=["x", "y"])
    assert [r.rid for r in named] == ["x", "y"]
    samples = requests(engine, ["a", "b"], {**SHORT, "n": 2}, rid="me")
    assert [r.rid for r in samples] == ["me_0_0", "me_0_1", "me_1_0", "me_1_1"]
    one, two = requests(engine, ["a", "b"], SHORT)
    assert one.rid != two.rid and len(one.rid) == 32


def test_seeds(fakes):
    first, second = (fakes.engine(random_seed=7) for _ in range(2))
    seeds = [request(first, "a", SHORT).seed for _ in range(3)]
    assert len(set(seeds)) == 3 and all(0 <= seed < 1 << 32 for seed in seeds)
    draw = np.random.default_rng(7)
    assert seeds == [draw.integers(1 << 32) for _ in range(3)]
    many = [r.seed for r in requests(first, ["a"] * 600, SHORT)]  # they are drawn by the block
    assert many == [draw.integers(1 << 32) for _ in range(600)]
    # A call that fails draws no seeds.
    with pytest.raises(ValueError, match="row 1"):
        second.generate(["a", "a"], [{}, {"top_p": 2.0}])
    assert [request(second, "a", SHORT).seed for _ in range(3)] == seeds
    assert request(first, "a", {**SHORT, "sampling_seed": 5}).seed == 5
    assert request(first, "a", {**SHORT, "sampling_seed": -1}).seed == (1 << 32) - 1


def test_logprob_arguments(engine):
    def specs(prompt=("a", "b"), **options):
        made = requests(engine, list(prompt), SHORT, **options)
        return [r.extras[0].spec if r.extras else None for r in made]

    assert specs() == [None, None]
    assert specs(top_logprobs_num=2) == [None, None]
    assert specs(return_logprob=True) == [LogprobSpec(), LogprobSpec()]
    assert specs(return_logprob=[True, False]) == [LogprobSpec(), None]
    assert specs(
        return_logprob=True,
        logprob_start_len=[0, -1],
        top_logprobs_num=[1, 0],
        token_ids_logprob=[[1, 2], None],
    ) == [LogprobSpec(0, 1, (1, 2)), LogprobSpec()]
    assert specs(return_logprob=True, token_ids_logprob=[3]) == [LogprobSpec(ids=(3,))] * 2
    assert specs(return_logprob=True, top_logprobs_num=None)[0] == LogprobSpec()


def test_stream_intervals(fakes):
    engine = fakes.engine(stream_interval=4)
    assert request(engine, "a", SHORT).stream_interval == 0
    loop = loop_of(engine)
    for params, expected in ((SHORT, 4), ({**SHORT, "stream_interval": 2}, 2)):
        list(engine.generate("a", params, stream=True))
        assert loop.submitted[-1].stream_interval == expected


def test_preferred_parameters(fakes):
    engine = fakes.engine(preferred_sampling_params='{"temperature": 0, "max_new_tokens": 3}')
    assert request(engine, "a").params.top_k == 1
    assert len(engine.generate("a")["output_ids"]) == 3
    assert len(engine.generate("a", {"max_new_tokens": 2})["output_ids"]) == 2
