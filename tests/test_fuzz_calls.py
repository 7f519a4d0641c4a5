"""Random calls, the same ones each time; the share of each outcome is printed (`pytest -s`)."""

from __future__ import annotations

import pytest

import jaxserve
from tests.fuzz import calls
from tests.marks import long

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(scope="module")
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **calls.OPTIONS) as engine:
        yield engine


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, long(12)])
def test_calls_end_in_an_answer_or_in_our_own_error(engine, seed):
    outcomes = calls.run(engine, 200, seed)
    print(calls.table(outcomes))
    assert outcomes["answered"] >= 30, "hardly a call was a good one"
    assert len(outcomes) >= 4, outcomes


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_calls(engine, seed):
    print(calls.table(calls.run(engine, 500, seed)))
