"""SamplingParams against the table of parameters: defaults, ranges, types, normal forms."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from jaxserve.errors import InvalidRequestError, UnknownOptionError
from jaxserve.sampling_params import FIELD_NAMES, GROUPS, TOP_K_ALL, SamplingParams, _Normalizer

NAN, INF = math.nan, math.inf

DEFAULTS = {
    "max_new_tokens": 128,
    "min_new_tokens": 0,
    "stop": (),
    "stop_token_ids": frozenset(),
    "stop_regex": (),
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 1 << 30,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "n": 1,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "stream_interval": None,
    "logit_bias": {},
    "sampling_seed": None,
    "custom_params": None,
    "transform": None,
    "transform_params": None,
    "hook": None,
    "hook_params": None,
}


OUT_OF_RANGE = [
    ("max_new_tokens", -1),
    ("min_new_tokens", -1),
    ("min_new_tokens", 129),
    ("temperature", -0.1),
    ("temperature", NAN),
    ("temperature", INF),
    ("top_p", 0.0),
    ("top_p", -0.5),
    ("top_p", 1.0001),
    ("top_p", NAN),
    ("top_k", 0),
    ("top_k", -2),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("min_p", NAN),
    ("frequency_penalty", -2.01),
    ("frequency_penalty", 2.01),
    ("frequency_penalty", NAN),
    ("presence_penalty", -2.01),
    ("presence_penalty", 2.01),
    ("presence_penalty", INF),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 2.01),
    ("repetition_penalty", NAN),
    ("n", 0),
    ("n", -1),
    ("stream_interval", 0),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop_regex", ""),
    ("stop_token_ids", [-1]),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"-1": 1.0}),
    ("logit_bias", {"x": 1.0}),
    ("logit_bias", {1: NAN}),
    ("logit_bias", {1: -INF}),
]

WRONG_TYPE = [
    *[
        (name, value)
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "n")
        for value in ("1", 1.0, True, [1])
    ],
    *[
        (name, value)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
        )
        for value in ("0.5", True, [0.5])
    ],
    *[
        (name, value)
        for name in (
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "no_stop_trim",
        )
        for value in (1, "yes", 0.0)
    ],
    ("stream_interval", "2"),
    ("sampling_seed", 1.5),
    ("sampling_seed", True),
    ("stop", 5),
    ("stop", [5]),
    ("stop", {"a": 1}),
    ("stop_regex", [None]),
    ("stop_token_ids", 5),
    ("stop_token_ids", "5"),
    ("stop_token_ids", ["5"]),
    ("stop_token_ids", [True]),
    ("logit_bias", [1, 2]),
    ("logit_bias", {1: "2"}),
    ("logit_bias", {1.5: 2.0}),
    ("json_schema", ["object"]),
    ("regex", {"a": 1}),
    ("custom_params", "x"),
    ("transform", 3),
    ("hook", 3),
    ("hook_params", [1]),
    ("transform_params", [1]),
]


def test_defaults_are_upstreams():
    assert dataclasses.asdict(SamplingParams()) == DEFAULTS
    assert SamplingParams.from_dict(None) == SamplingParams.from_dict({}) == SamplingParams()


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE + WRONG_TYPE)
def test_bad_values_name_the_parameter_and_the_value(name, value):
    with pytest.raises(ValueError) as caught:
        SamplingParams.from_dict({name: value})
    assert isinstance(caught.value, InvalidRequestError)
    message = str(caught.value)
    assert name in message
    bad = value
    if isinstance(value, dict):
        key, bias = next(iter(value.items()))
        bad = bias if isinstance(key, int) and key >= 0 else key
    elif isinstance(value, list) and len(value) == 1 and name == "stop_token_ids":
        bad = value[0]
    assert str(bad) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", 1),
        ("min_p", 0),
        ("min_p", 1),
        ("frequency_penalty", -2),
        ("frequency_penalty", 2),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("repetition_penalty", 2),
        ("repetition_penalty", 1e-3),
        ("n", 64),
        ("stream_interval", 1),
        ("sampling_seed", -5),
        ("sampling_seed", 1 << 70),
        ("max_new_tokens", np.int64(7)),
        ("temperature", np.float32(0.5)),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(name, value):
    assert getattr(SamplingParams.from_dict({name: value}), name) is not None


def test_unknown_keys_are_type_errors_with_near_matches():
    with pytest.raises(TypeError, match=r"'temprature'.*'temperature'") as caught:
        SamplingParams.from_dict({"temprature": 1.0})
    assert isinstance(caught.value, UnknownOptionError)
    for name in ("seed", "best_of", "logprobs", "max_tokens", "typical_p", "bad_words"):
        with pytest.raises(TypeError, match=repr(name)):
            SamplingParams.from_dict({name: 1})
    with pytest.raises(ValueError, match="sampling_params"):
        SamplingParams.from_dict([1])  # pyright: ignore


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_none_is_the_default_and_for_max_new_tokens_no_limit(name):
    params = SamplingParams.from_dict({name: None})
    assert getattr(params, name) == (None if name == "max_new_tokens" else DEFAULTS[name])


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-7, 9.9e-7])
def test_tiny_temperatures_are_greedy(temperature):
    params = SamplingParams.from_dict({"temperature": temperature, "top_k": 50})
    assert (params.temperature, params.top_k) == (1.0, 1)


def test_normal_forms():
    params = SamplingParams.from_dict(
        {
            "temperature": 1e-6,
            "top_k": -1,
            "stop": "END",
            "stop_regex": ["a+", "b"],
            "stop_token_ids": [3, 3, None, 2],
            "logit_bias": {"5": 1, 6: -2.5, " 7 ": 0},
        }
    )
    assert (params.temperature, params.top_k) == (1e-6, TOP_K_ALL)
    assert (params.stop, params.stop_regex) == (("END",), ("a+", "b"))
    assert params.stop_token_ids == {2, 3}
    assert params.logit_bias == {5: 1.0, 6: -2.5, 7: 0.0}
    assert SamplingParams.from_dict({"top_k": 1 << 40}).top_k == TOP_K_ALL
    assert dataclasses.replace(params) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore
    assert SamplingParams.from_dict(params) is params  # pyright: ignore


def test_the_engines_preferred_parameters_lie_under_the_requests():
    preferred = {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}
    params = SamplingParams.from_dict({"temperature": 0.7, "top_p": None}, preferred)
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.7, 0.9, 7)
    assert SamplingParams.from_dict({"max_new_tokens": None}, preferred).max_new_tokens is None
    grammar = {"regex": "a", "top_p": 0.9}
    assert SamplingParams.from_dict({}, grammar).grammar == ("regex", "a")
    params = SamplingParams.from_dict({"ebnf": "b"}, grammar)
    assert (params.grammar, params.top_p) == (("ebnf", "b"), 0.9)
    with pytest.raises(TypeError):
        SamplingParams.from_dict({}, {"nonsense": 1})


@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf", "structural_tag"])
def test_grammars_are_exclusive(name):
    assert SamplingParams.from_dict({name: "x"}).grammar == (name, "x")
    other = "ebnf" if name == "regex" else "regex"
    with pytest.raises(ValueError, match="Only one of"):
        SamplingParams.from_dict({name: "x", other: "y"})
    assert SamplingParams.from_dict({name: ""}) == SamplingParams()
    assert SamplingParams().grammar is None


def test_a_schema_may_be_a_dict():
    for schema in ({"type": "array", "prefixItems": ({}, {"const": "é"})}, {}):
        text = SamplingParams.from_dict({"json_schema": schema}).json_schema
        assert json.loads(text) == json.loads(json.dumps(schema))
    nested = {}
    for _ in range(100):
        nested = {"items": nested}
    for schema in ({"const": float("nan")}, {"const": object()}, {1.5: 2}, nested):
        with pytest.raises(InvalidRequestError, match=r"^json_schema "):
            SamplingParams.from_dict({"json_schema": schema})


def test_empty_parameters_of_algorithms_are_none():
    for name in ("custom_params", "transform_params", "hook_params"):
        assert getattr(SamplingParams.from_dict({name: {"a": 1}}), name) == {"a": 1}
        assert SamplingParams.from_dict({name: {}}) == SamplingParams()


def test_the_light_modules_import_no_jax():
    program = (
        "import sys, jaxserve, jaxserve.sampling_params, jaxserve.server_args, jaxserve.request,"
        "jaxserve.text.stop, jaxserve.mailbox, jaxserve.output.result, jaxserve.engine;"
        "jaxserve.Engine, jaxserve.SamplingParams, jaxserve.ServerArgs, jaxserve.EngineDeadError;"
        "assert not {'jax', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_groups_have_every_parameter_once_and_their_defaults_are_normal():
    names = [name for _, defaults in GROUPS for name, _ in defaults]
    assert sorted(names) == sorted(FIELD_NAMES)
    params = SamplingParams()
    normal = _Normalizer(params)
    for normalize, _ in GROUPS:
        normalize(normal)
    for name, value in normal.values.items():
        default = getattr(params, name)
        assert value == default and type(value) is type(default), name


@pytest.mark.parametrize("normalize, defaults", GROUPS)
def test_each_parameter_of_a_group_has_it_checked(normalize, defaults):
    for name, _ in defaults:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: object()})
