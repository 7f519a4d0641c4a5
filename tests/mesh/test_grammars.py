"""Grammars where requests run on replicas, and where a model is cut over devices."""

from __future__ import annotations

import re

import pytest

import jaxserve
from tests.mesh.cases import HEADS, OPTIONS
from tests.prompts import ids
from tests.schemas import SCHEMAS

pytestmark = pytest.mark.usefixtures("kept_programs")

REGEX = "([a-f]{2}-){8}[0-9]{2}"
SEEDED = {"temperature": 0.8, "sampling_seed": 11, "max_new_tokens": 40}
PROMPTS = [f"Number {row}" for row in range(8)]
PARAMS = [
    {**SEEDED, "regex": REGEX},
    SEEDED,
    {**SEEDED, "json_schema": SCHEMAS["people"]},
    {**SEEDED, "regex": REGEX, "ignore_eos": True},
] * 2
CALLS = (
    {"prompt": PROMPTS, "sampling_params": PARAMS},
    {"prompt": "One", "sampling_params": {**SEEDED, "regex": REGEX, "n": 5}},
)


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama", **HEADS)


@pytest.fixture(scope="module")
def expected(folder):
    with jaxserve.Engine(folder, **{**OPTIONS, "skip_tokenizer_init": False}) as engine:
        return [ids(engine.generate(**call)) for call in CALLS]


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2, 2), (2, 1)], ids=str)
def test_the_tokens_of_one_device(folder, expected, sizes):
    dp_size, tp_size = sizes
    options = {**OPTIONS, "skip_tokenizer_init": False, "dp_size": dp_size, "tp_size": tp_size}
    with jaxserve.Engine(folder, **options) as engine:
        results = [engine.generate(**call) for call in CALLS]
        assert engine.get_server_info()["late_compiles"] == 0
    assert [ids(found) for found in results] == expected
    for found, params in zip(results[0], PARAMS, strict=True):
        assert "regex" not in params or re.fullmatch(REGEX, found["text"])
    if dp_size > 1:
        assert {found["meta_info"]["dp_rank"] for found in results[0]} == {0, 1}
