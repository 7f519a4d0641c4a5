"""What callers have instead of lists of Python's own types, and what they leave out."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxserve.errors import InvalidRequestError, NotSupportedError
from tests.api_fakes import Fakes, byte_level_tokenizer, loop_of

TOKENIZER = byte_level_tokenizer()
SHORT = {"max_new_tokens": 2}
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        fakes = Fakes(TOKENIZER, patch)
        yield fakes.engine()
        fakes.close()


def submitted(engine, *args, **kwargs):
    before = len(loop_of(engine).submitted)
    result = engine.generate(*args, **kwargs)
    return result, loop_of(engine).submitted[before:]


@pytest.mark.parametrize(
    "ids",
    [
        np.array(IDS),
        np.array(IDS, np.uint8),
        np.array(IDS, object),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        jnp.array(IDS),
        list(torch.tensor(IDS)),
        list(np.array(IDS)),
        list(jnp.array(IDS)),
        tuple(IDS),
    ],
    ids=range(10),
)
def test_one_row_of_ids(engine, ids):
    result, [request] = submitted(engine, input_ids=ids, sampling_params=SHORT)
    assert isinstance(result, dict) and request.prompt_ids == IDS
    assert {type(token) for token in request.prompt_ids} == {int}


@pytest.mark.parametrize(
    "rows",
    [
        np.array([IDS, IDS]),
        torch.tensor([IDS, IDS]),
        jnp.array([IDS, IDS]),
        [torch.tensor(IDS), torch.tensor(IDS)],
        [jnp.array(IDS), np.array(IDS)],
        (IDS, tuple(IDS)),
        np.array([np.array(IDS), IDS], object),
    ],
    ids=range(7),
)
def test_rows_of_ids(engine, rows):
    result, requests = submitted(engine, input_ids=rows, sampling_params=SHORT)
    assert len(result) == 2 and [request.prompt_ids for request in requests] == [IDS, IDS]


def test_ragged_rows_of_tensors(engine):
    rows = [torch.tensor([5]), torch.tensor(IDS)]
    _, requests = submitted(engine, input_ids=rows, sampling_params=SHORT)
    assert [request.prompt_ids for request in requests] == [[5], IDS]


@pytest.mark.parametrize(
    "prompts",
    [
        np.array(["a", "b"]),
        np.array(["a", "b"], object),
        ("a", "b"),
        [np.str_("a"), "b"],
    ],
    ids=range(4),
)
def test_arrays_of_prompts(engine, prompts):
    result, _ = submitted(engine, prompts, SHORT, return_prompt_token_ids=True)
    plain = engine.generate(["a", "b"], SHORT, return_prompt_token_ids=True)
    ids = [each["prompt_token_ids"] for each in plain]
    assert [each["prompt_token_ids"] for each in result] == ids


def test_a_prompt_in_an_array_without_dimensions(engine):
    assert isinstance(engine.generate(np.array("a"), SHORT), dict)


def test_ids_beside_prompts_are_what_runs(engine):
    result, [request] = submitted(engine, "a text", SHORT, input_ids=IDS)
    assert isinstance(result, dict) and request.prompt_ids == IDS
    result, requests = submitted(
        engine, np.array(["x", ""]), SHORT, input_ids=[torch.tensor(IDS), [9]]
    )
    assert isinstance(result, list) and [r.prompt_ids for r in requests] == [IDS, [9]]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("a", [IDS]), (["a"], IDS), (["a", "b"], [IDS]), ([], [IDS]), (["a"] * 3, np.ones((2, 2)))],
    ids=range(5),
)
def test_prompts_and_ids_of_different_shapes(engine, prompt, ids):
    with pytest.raises(InvalidRequestError, match="prompt and input_ids differ in shape"):
        engine.generate(prompt, SHORT, input_ids=ids)


@pytest.mark.parametrize(
    "nothing", [None, False, [], [[]], [None], [[], [None]], (), {}, np.array([])], ids=range(9)
)
@pytest.mark.parametrize("name", ["image_data", "lora_path", "session_params"])
def test_nested_empties_are_absent(engine, name, nothing):
    assert engine.generate("a", SHORT, **{name: nothing})["text"]


@pytest.mark.parametrize("media", ["x.png", [["x.png"]], [None, "x.png"], [[], [b"1"]], 0])
def test_what_is_given_is_refused(engine, media):
    with pytest.raises(NotSupportedError, match="image_data needs a model that takes images"):
        engine.generate("a", SHORT, image_data=media)


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", jnp.float32(0.5), 0.5),
        ("top_p", torch.tensor(0.5), 0.5),
        ("top_k", np.array(3), 3),
        ("max_new_tokens", torch.tensor(2), 2),
        ("ignore_eos", np.bool_(True), True),
        ("ignore_eos", torch.tensor(True), True),
        ("stop_token_ids", torch.tensor([3, 4]), frozenset({3, 4})),
        ("stop_token_ids", (i for i in (3, None, 4)), frozenset({3, 4})),
        ("stop_token_ids", np.array([3, 4]), frozenset({3, 4})),
        ("stop", np.array(["x", "y"]), ("x", "y")),
        ("logit_bias", {np.int64(3): np.float32(1)}, {3: 1.0}),
    ],
    ids=range(12),
)
def test_sampling_parameters(engine, key, value, plain):
    _, [request] = submitted(engine, "a", {"max_new_tokens": 2, key: value})
    assert getattr(request.params, key) == plain
    assert type(getattr(request.params, key)) is type(plain)


def test_arguments_as_arrays(engine):
    _, requests = submitted(
        engine, ["a", "b"], SHORT,
        return_logprob=np.array([True, False]), top_logprobs_num=np.array([1, 2]),
        rid=np.array(["one", "two"]), cache_salt=np.array(["x", "y"]), stream=np.False_,
        priority=np.int64(3),
    )  # fmt: skip
    assert [request.rid for request in requests] == ["one", "two"]
    assert [request.namespace for request in requests] == ["salt=1:x;", "salt=1:y;"]
    assert requests[0].extras[0].spec.top == 1 and requests[1].extras == ()
    _, [request] = submitted(
        engine, "a", SHORT, return_logprob=np.True_, token_ids_logprob=torch.tensor([3, 4])
    )
    assert request.extras[0].spec.ids == (3, 4)


def test_a_path_is_no_prompt(engine):
    for prompt in (Path("x"), b"x", 3, {"text": "x"}, iter(["x"])):
        with pytest.raises(InvalidRequestError, match="prompt must be a string or a list"):
            engine.generate(prompt, SHORT)
