"""Chains within the decode step draw what they draw behind it, several tokens a dispatch."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxserve
from jaxserve.transforms import Transform
from tests import inside
from tests.prompts import ids
from tests.test_chains import (
    DETERMINISTIC,
    NEUTRAL,
    OPTIONS,
    VOCAB,
    asks,
    check_logprobs,
    check_neutral,
    check_streams,
    expected,
    register,
    text,
)

pytestmark = pytest.mark.usefixtures("exact_products")
SEVERAL = {**OPTIONS, "num_continuous_decode_steps": 4}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(folder):
    with jaxserve.Engine(folder, **SEVERAL) as engine:
        register(engine, fuse=True)
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


@pytest.fixture
def ran(engine, monkeypatch):
    """How often each kind of program has run since the test began."""
    runner, count = inside.runner(engine), collections.Counter()
    queue = runner._queue

    def counted(key, executable, given):
        kind, fused, _ = key[0].partition("_sample_")
        count[f"{kind} fused" if fused else kind] += 1
        return queue(key, executable, given)

    monkeypatch.setattr(runner, "_queue", counted)
    return count


def test_four_tokens_a_dispatch_beside_plain_rows(engine, ran):
    prompts = [text(seed, length) for seed, length in enumerate((1, 8, 23, 41))]
    plain = {"max_new_tokens": 21, "temperature": 0, "frequency_penalty": 0.5, "ignore_eos": True}
    alone = ids(engine.generate(input_ids=prompts[2:3], sampling_params=plain))
    ran.clear()
    params = [asks(21), asks(21, add=4), plain, asks(21, first=7, list=[5, 6])]
    found = ids(engine.generate(input_ids=prompts, sampling_params=params))
    assert found[0] == expected(prompts[0], 21)
    assert found[1] == expected(prompts[1], 21, add=4)
    assert found[2] == alone[0]
    assert found[3] == expected(prompts[3], 21, first=7, numbers=(5, 6))
    assert ran["decode_many fused"] == 5  # four tokens each behind the first one
    assert not any(ran[kind] for kind in ("forward", "decode", "decode fused", "decode_many"))


@pytest.mark.parametrize("params", NEUTRAL, ids=str)
def test_a_transform_that_changes_nothing(engine, ran, params):
    check_neutral(engine, {"max_new_tokens": 13, **params})
    assert ran["forward"] == 0 < ran["decode_many fused"]


def test_observe_is_told_logprobs(engine, ran):
    check_logprobs(engine, fuse=True)
    assert ran["forward"] == 0 < ran["decode_many fused"]


def test_other_neighbours(engine, ran):
    """Beside a second chain, or a grammar, all rows are drawn apart, and go on together after."""
    prompts = [text(seed, 12) for seed in range(2)]
    found = engine.generate(
        input_ids=prompts, sampling_params=[asks(20), {**asks(9, "same"), "temperature": 0}]
    )
    assert found[0]["output_ids"] == expected(prompts[0], 20)
    alone = engine.generate(
        input_ids=prompts[1], sampling_params={**asks(9), "transform": None, "temperature": 0}
    )
    assert found[1]["output_ids"] == alone["output_ids"]
    assert ran["forward"] > 5 and ran["decode_many fused"] > 0


def test_more_requests_than_slots_in_streams(engine):
    check_streams(engine)


def test_retraction_and_a_failure(folder):
    """State and history are made anew from the tokens."""
    prompts = [text(200 + seed, 20) for seed in range(4)]
    with jaxserve.Engine(folder, **{**SEVERAL, "max_total_tokens": 160}) as engine:
        register(engine, fuse=True)
        runner, calls = inside.runner(engine), iter(range(1000))
        queue = runner._queue

        def fails_once(key, executable, given):
            if key[0].startswith("decode_many_sample") and next(calls) == 3:
                raise RuntimeError("injected")
            return queue(key, executable, given)

        runner._queue = fails_once
        results = engine.generate(input_ids=prompts, sampling_params=asks(60))
    assert ids(results) == [expected(prompt, 60) for prompt in prompts]
    assert any(result["meta_info"]["num_retractions"] for result in results)
    assert next(calls) > 10


def test_inner_layers_and_hidden_states(folder):
    """A chain may read layers and ask the LM head; what rows want of the inside is there, too."""

    def early(logits, state, params, context):
        best = context.logits(context.layer(1)).argmax()
        return jnp.where(jnp.arange(VOCAB) == best, logits, -jnp.inf)

    options = {
        "enable_return_hidden_states": True, "hidden_state_layers": [1], "cuda_graph_bs": [1, 4],
    }  # fmt: skip
    with jaxserve.Engine(folder, **{**SEVERAL, **options}) as engine:
        engine.register("apart", Transform(early))
        engine.register("within", Transform(early), fuse=True)
        params = {"max_new_tokens": 9, "temperature": 0, "ignore_eos": True}
        found = [
            engine.generate(
                input_ids=[text(1, 9), text(2, 12)],
                sampling_params=[{**params, "transform": name}, params],
                return_hidden_states=[True, False],
            )
            for name in ("apart", "within")
        ]
        assert engine.get_server_info()["late_compiles"] == 0
    assert ids(found[0]) == ids(found[1])
    states = [result[0]["meta_info"]["hidden_states"] for result in found]
    assert [len(each) for each in states[0]] == [len(each) for each in states[1]]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max())


def test_what_cannot_be(engine, folder):
    with pytest.raises(jaxserve.InvalidRequestError, match="fuse must be True or False, got 'yes'"):
        engine.register("bad", Transform(lambda x, s, p, c: x), fuse="yes")
    with (
        jaxserve.Engine(folder, **{**OPTIONS, **DETERMINISTIC}) as other,
        pytest.raises(jaxserve.InvalidRequestError, match="fuse=True of the transform 'bad'"),
    ):
        other.register("bad", Transform(lambda x, s, p, c: x), fuse=True)
