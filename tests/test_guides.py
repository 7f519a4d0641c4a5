"""What decides on the host about tokens: guides made by these tests, in engines."""

from __future__ import annotations

import numpy as np
import pytest

import jaxserve
from jaxserve.guides.guide import Guide, GuideSpec
from jaxserve.transforms import Transform
from tests.marks import long
from tests.prompts import ids
from tests.test_chains import DETERMINISTIC, OPTIONS, VOCAB, text

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")


def follows(prompt, outputs):
    """The token that these guides choose."""
    return (prompt[-1] + 7 * len(outputs) + 3 * sum(outputs)) % VOCAB


def expected(prompt, count):
    made = []
    for _ in range(count):
        made.append(follows(prompt, made))
    return made


class Choosing(Guide):
    """Knows the request; counts how often it was asked."""

    asked = 0

    def __init__(self, request):
        self.request = request

    def next(self, outputs):
        Choosing.asked += 1
        return follows(self.request.prompt_ids, outputs)


class Masking(Choosing):
    masks = True

    def mask(self, outputs, bits):
        allowed = np.zeros(bits.size * 32, bool)
        allowed[self.next(outputs)] = True
        bits[:] &= np.packbits(allowed, bitorder="little").view(np.int32)


class Editing(Choosing):
    edits = True

    def edit(self, outputs, logits):
        assert logits.shape == (VOCAB,) and logits.dtype == np.float32
        logits[:] = -np.inf
        logits[self.next(outputs)] = 0
        return logits


class Failing(Choosing):
    masks = edits = True
    fails_in = "mask"

    def mask(self, outputs, bits):
        if len(outputs) == 3 and self.fails_in == "mask":
            raise ZeroDivisionError("no")

    def edit(self, outputs, logits):
        if len(outputs) == 3:
            raise KeyError("no")
        return logits


class Spec(GuideSpec):
    def __init__(self, kind):
        self.kind = kind

    def guide(self, request):
        return self.kind(request)


@pytest.fixture
def guided(monkeypatch):
    """`guided(*kinds)`: guides for the prompts of the calls that follow; None: of none."""

    def choose(*kinds):
        specs = [None if kind is None else Spec(kind) for kind in kinds]
        monkeypatch.setattr("jaxserve.api.guides.KINDS", (lambda asking: specs,))

    return choose


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(folder):
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


def asks(tokens, **params):
    return {"max_new_tokens": tokens, "ignore_eos": True, "sampling_seed": 1, **params}


def test_guided_and_free_rows(engine, guided):
    prompts = [text(seed, length) for seed, length in enumerate((5, 70, 17, 9))]
    free = [engine.generate(input_ids=prompt, sampling_params=asks(15)) for prompt in prompts]
    guided(Masking, None, Editing, Masking)
    found = engine.generate(input_ids=prompts, sampling_params=asks(15), return_logprob=True)
    assert ids(found)[1] == free[1]["output_ids"]
    for number in (0, 2, 3):
        assert found[number]["output_ids"] == expected(prompts[number], 15)
        logprobs = found[number]["meta_info"]["output_token_logprobs"]
        assert [logprob for logprob, *_ in logprobs] == [0.0] * 15


def test_penalties_come_before_and_chains_after(engine, guided):
    """An editing guide sees biased logits, which are not biased again."""
    seen = []

    class Watching(Guide):
        edits = True

        def edit(self, outputs, logits):
            seen.append(logits.copy())
            return logits

    prompt, bias = text(3, 12), {"40": 60.0, "41": 45.0}
    params = asks(2, temperature=0, logit_bias=bias)
    plain = engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True)
    guided(lambda request: Watching())
    ours = engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True)
    assert ours["output_ids"] == plain["output_ids"] == [40, 40]
    assert seen[0][40] > seen[0][41] > np.delete(seen[0], [40, 41]).max()
    for one, other in zip(
        *(x["meta_info"]["output_token_logprobs"] for x in (plain, ours)), strict=True
    ):
        assert one[0] == pytest.approx(other[0], abs=2e-5)

    engine.register("second", Transform(lambda x, s, p, c: x.at[x.argmax()].set(-np.inf)))
    ours = engine.generate(input_ids=prompt, sampling_params={**params, "transform": "second"})
    assert ours["output_ids"] == [41, 41]


@pytest.mark.parametrize("where", ["mask", "edit"])
def test_a_guide_that_fails_costs_its_request(engine, guided, where, caplog):
    prompts = [text(seed, 10) for seed in range(3)]
    Failing.fails_in = where
    guided(Masking, Failing, Editing)
    cause = "ZeroDivision" if where == "mask" else "KeyError"
    with pytest.raises(jaxserve.RequestFailedError, match=cause):
        engine.generate(input_ids=prompts, sampling_params=asks(8))
    assert "a guide of request" in caplog.text
    guided(Masking, Editing)
    calls = engine.generate(input_ids=prompts[:2], sampling_params=asks(8))
    assert ids(calls) == [expected(prompt, 8) for prompt in prompts[:2]]


@pytest.mark.parametrize(
    "options",
    [
        {"max_total_tokens": 160, "num_continuous_decode_steps": 4},
        long(DETERMINISTIC),
    ],
    ids=str,
)
def test_retraction_and_samples(folder, guided, options):
    prompts = [text(200 + seed, 20) for seed in range(4)]
    with jaxserve.Engine(folder, **{**OPTIONS, **options}) as engine:
        guided(Masking, Masking, Editing, Masking)
        results = engine.generate(input_ids=prompts, sampling_params=asks(60))
        assert ids(results) == [expected(prompt, 60) for prompt in prompts]
        retracted = any(result["meta_info"]["num_retractions"] for result in results)
        assert retracted == ("max_total_tokens" in options)
        guided(Masking)
        samples = engine.generate(input_ids=prompts[0], sampling_params=asks(9, n=3))
        assert ids(samples) == [expected(prompts[0], 9)] * 3
