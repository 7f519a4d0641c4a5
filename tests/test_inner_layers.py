"""Transforms that read inner layers, against Hugging Face's hidden states and LM head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxserve
from jaxserve.transforms import Transform
from tests.oracles.huggingface import Reference
from tests.prompts import ids
from tests.test_chains import OPTIONS, text

pytestmark = [pytest.mark.usefixtures("exact_products", "kept_programs"), pytest.mark.slow]
STATES = {"enable_return_hidden_states": True, "hidden_state_layers": [0, 1]}
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def dola(logits, state, params, context):
    """Chuang et al. 2023: what the last layer says more than an inner one, among likely tokens."""
    last, early = (jax.nn.log_softmax(x) for x in (logits, context.logits(context.layer(1))))
    likely = last >= last.max() + jnp.log(params["share"])
    return jnp.where(likely, last - early, -jnp.inf)


def states_alone(logits, state, params, context):
    """Which of D numbers is largest: of the embedding, the first layer, and the last one."""
    places = [x.argmax() for x in (context.layer(0), context.layer(-2), context.layer(-1))]
    token = places[0] + 64 * places[1] + 3 * places[2] + 2 * context.layer(2).argmax()
    return jnp.where(jnp.arange(logits.shape[0]) == token % logits.shape[0], logits, -jnp.inf)


def either(logits, state, params, context):
    """One of the two, as the request says."""
    found = [each(logits, state, params, context) for each in (dola, states_alone)]
    return jnp.where(params["places"] > 0, found[1], found[0])


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


def of_hugging_face(model, tokens):
    """Hidden states of the last position, and logits of those of layer 1 and of the last one."""
    with torch.no_grad():
        found = model(torch.tensor([tokens]), output_hidden_states=True)
        early = model.lm_head(model.model.norm(found.hidden_states[1][0, -1]))
    inner = [x[0, -1].numpy() for x in found.hidden_states]
    return inner, early.double(), found.logits[0, -1].double()


def test_inner_layers(folder):
    """Of a prompt in chunks, and of a short one."""
    prompts, model = [text(41, 90), text(42, 15)], Reference(folder).model
    with jaxserve.Engine(folder, **{**OPTIONS, "max_running_requests": 1}, **STATES) as engine:
        engine.register("inner", Transform(either, params={"share": 0.3, "places": 0}))
        ways = [{**GREEDY, "transform": "inner"}] * 2
        ways[1] = {**ways[1], "transform_params": {"places": 1}}
        chosen = ids(engine.generate(input_ids=prompts, sampling_params=ways))
        assert engine.get_server_info()["late_compiles"] == 0
    differs = 0
    for number, token in enumerate(chosen[0]):
        _, early, last = of_hugging_face(model, prompts[0] + chosen[0][:number])
        last, early = last.log_softmax(-1), early.log_softmax(-1)
        score = last - early
        score[last < last.max() + np.log(0.3)] = -np.inf
        assert score[token] > score.max() - 1e-4
        differs += int(last.argmax()) != token
    assert differs
    for number, token in enumerate(chosen[1]):
        inner, *_ = of_hugging_face(model, prompts[1] + chosen[1][:number])
        first, second, last = (int(x.argmax()) for x in inner)
        assert token == (first + 64 * second + 5 * last) % 512


def test_layers_that_are_not_there(folder):
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        message = r"apply of .* ValueError: layer\(1\) is not reported.*this engine's are \[\]"
        with pytest.raises(jaxserve.InvalidRequestError, match=message):
            engine.register("dola", Transform(dola, params={"share": 0.3}))
