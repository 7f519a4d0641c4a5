"""Hooks in the model against Hugging Face's model with PyTorch's hooks in it."""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxserve
from jaxserve import transforms
from tests.oracles.huggingface import Reference
from tests.prompts import ids
from tests.test_chains import OPTIONS, text

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
D = 64
VECTOR = np.random.default_rng(0).normal(size=D).astype(np.float32)
POINTS = ("embed", "layer.0.attn", "layer.0.mlp", "layer.1.attn", "layer.1.mlp", "final_norm")
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def steer(x, params, context):
    """Adds a vector, more of it the later the token."""
    return x + params["alpha"] * (1 + 0.1 * context.position) * context.tables["vector"]


def register(engine):
    for point in POINTS:
        engine.register_hook(point, {point: steer}, {"alpha": 0.3}, {"vector": VECTOR})
    engine.register_hook("scaled", dict.fromkeys(PARTS, scale), {"by": 1.0})


PARTS = ("layer.0.heads", "layer.0.mlp_out", "layer.1.attn_out")


def scale(x, params, context):
    """Another thing before a sum than behind it; each number has a factor of its own."""
    return x * (1 + params["by"] * jnp.linspace(-1, 1, x.shape[0])) + 0.01 * context.position


@contextlib.contextmanager
def scaled(model, by):
    """The same at the three parts of a model of Hugging Face."""

    def changed(x):
        factors = 1 + by * torch.linspace(-1, 1, x.shape[-1])
        return x * factors + 0.01 * torch.arange(x.shape[-2])[:, None]

    first, second = model.model.layers
    handles = [
        first.self_attn.o_proj.register_forward_pre_hook(lambda _, x: (changed(x[0]),)),
        first.mlp.register_forward_hook(lambda _, x, y: changed(y)),
        second.self_attn.register_forward_hook(lambda _, x, y: (changed(y[0]), *y[1:])),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_by_attention(layer):
    """The module whose output the stream gets: the norm behind attention, if there is one."""
    if hasattr(layer, "post_feedforward_layernorm"):  # Gemma, OLMo
        return layer.post_attention_layernorm
    return getattr(layer, "post_self_attn_layernorm", layer.self_attn)  # GLM-4


@contextlib.contextmanager
def steered(model, point, alpha):
    """The same in a model of Hugging Face, where what attention adds is ready: behind its norm, and
    before it is scaled, if there is that."""
    inner = model.model
    place = {"embed": inner.embed_tokens, "final_norm": inner.norm}.get(point)
    if place is None:
        _, index, half = point.split(".")
        layer = inner.layers[int(index)]
        place = added_by_attention(layer) if half == "attn" else layer
        if half == "attn":  # Granite multiplies what is added
            alpha /= getattr(model.config, "residual_multiplier", 1)

    def hook(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        positions = torch.arange(first.shape[-2])[:, None]
        changed = first + alpha * (1 + 0.1 * positions) * torch.from_numpy(VECTOR)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = place.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check(reference, prompt, result, point, alpha):
    """All of a result's logprobs, of its prompt and its outputs."""
    with steered(reference.model, point, alpha):
        compare(reference, prompt, result)


def compare(reference, prompt, result):
    whole = prompt + result["output_ids"]
    expected = reference.logprobs(whole[:-1]).numpy()
    meta = result["meta_info"]
    found = [each[0] for each in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
    wanted = expected[np.arange(len(whole) - 1), whole[1:]]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def engine(folder):
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        register(engine)
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


SCORED = {"return_logprob": True, "logprob_start_len": 0}


def test_every_point_in_one_batch(engine, reference):
    prompts = [text(seed, 9 + 13 * seed) for seed in range(len(POINTS) + 1)]
    params = [{**GREEDY, "hook": point} for point in POINTS]
    params[1] = {**params[1], "hook_params": {"alpha": -0.5}}
    results = engine.generate(input_ids=prompts, sampling_params=[*params, GREEDY], **SCORED)
    for point, prompt, result, asked in zip(POINTS, prompts, results, params, strict=False):
        alpha = asked.get("hook_params", {"alpha": 0.3})["alpha"]
        check(reference, prompt, result, point, alpha)
    check(reference, prompts[-1], results[-1], "embed", 0.0)


def test_parts_before_the_sum(engine, reference):
    """Results of heads, and what attention and MLP add, in one hook."""
    params = {**GREEDY, "hook": "scaled", "hook_params": {"by": 0.5}}
    result = engine.generate(input_ids=text(5, 30), sampling_params=params, **SCORED)
    with scaled(reference.model, 0.5):
        compare(reference, text(5, 30), result)
    plain = engine.generate(input_ids=text(5, 30), sampling_params=GREEDY, **SCORED)
    with pytest.raises(AssertionError), scaled(reference.model, 0.5):
        compare(reference, text(5, 30), plain)


BLOCKS = ("qwen3", "cohere2", "gemma3", "glm4", "granite", "olmo2")
"""Families whose blocks sum otherwise, or have other norms around what they sum."""


@pytest.mark.long
@pytest.mark.parametrize("family", BLOCKS)
def test_families(tiny_models, family):
    folder = tiny_models(family)
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        point = "layer.1.attn"
        engine.register_hook("s", {point: steer}, {"alpha": 0.3}, {"vector": VECTOR})
        result = engine.generate(
            input_ids=text(1, 30), sampling_params={**GREEDY, "hook": "s"}, **SCORED
        )
    check(Reference(folder), text(1, 30), result, point, 0.3)


def test_nobody_sees_the_cache_of_another(engine):
    """The same prompt, plain, steered and steered otherwise, in turns, cold and warm."""
    prompt = text(70, 100)
    ways = [
        GREEDY,
        {**GREEDY, "hook": "layer.0.mlp"},
        {**GREEDY, "hook": "layer.0.mlp", "hook_params": {"alpha": 1.0}},
        {**GREEDY, "hook": "layer.1.mlp"},
    ]
    alone = []
    for params in ways:
        engine.flush_cache()
        alone.append(engine.generate(input_ids=prompt, sampling_params=params)["output_ids"])
    assert len(set(map(tuple, alone))) == len(ways)
    engine.flush_cache()
    for turn in range(3):
        results = engine.generate(input_ids=[prompt] * 8, sampling_params=ways * 2)
        assert ids(results) == alone * 2
        cached = [result["meta_info"]["cached_tokens"] for result in results]
        assert all(cached) if turn else not any(cached[: len(ways)])


def test_samples_retraction_and_chains(folder, reference):
    """With transforms behind them, several steps a program, and too few pages."""
    options = {**OPTIONS, "max_total_tokens": 160, "num_continuous_decode_steps": 4}
    prompts = [text(200 + seed, 20) for seed in range(4)]
    with jaxserve.Engine(folder, **options) as engine:
        engine.register_hook("s", {"layer.0.mlp": steer}, {"alpha": 0.3}, {"vector": VECTOR})
        engine.register("sigma", transforms.top_n_sigma(), {"top_n_sigma": 9.0})
        params = {**GREEDY, "max_new_tokens": 50, "hook": "s"}
        ways = [params, {**params, "transform": "sigma"}, {**GREEDY, "max_new_tokens": 50}, params]
        results = engine.generate(input_ids=prompts, sampling_params=ways, return_logprob=True)
        assert any(result["meta_info"]["num_retractions"] for result in results)
        for number, alpha in enumerate((0.3, 0.3, 0.0, 0.3)):
            tokens, prompt = results[number]["output_ids"], prompts[number]
            with steered(reference.model, "layer.0.mlp", alpha):
                reference.assert_greedy(prompt, tokens)
        samples = engine.generate(
            input_ids=prompts[0], sampling_params={**params, "n": 3, "max_new_tokens": 9}
        )
        assert ids(samples) == [results[0]["output_ids"][:9]] * 3


def wrong(x, params, context):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "points must be a dict of functions by point, got {}"),
        ({"layer.0.mpl": steer}, "'layer.0.mpl'.*none of embed, layer.<i>.heads"),
        ({"layer.2.mlp": steer}, r"the model has 2 layers, 0 to 1"),
        ({"embed": 3}, r"points\['embed'\] must be a function, got 3"),
        ({"embed": wrong}, "embed of the hook 'bad' cannot be traced: KeyError"),
        ({"embed": lambda x, p, c: x[:3]}, r"returns \[3\], expected \[64\]"),
        ({"layer.0.heads": lambda x, p, c: x[:3]}, r"returns \[3\], expected \[64\]"),
        ({"layer.0.heads_out": steer}, "'layer.0.heads_out'.*none of embed, layer.<i>.heads"),
        ({"embed": lambda x, p, c: x + LARGE[0]}, "closes over arrays of 80000 bytes"),
    ],
    ids=range(9),
)
def test_what_cannot_be_registered(engine, points, message):
    with pytest.raises(jaxserve.InvalidRequestError, match=message):
        engine.register_hook("bad", points)
    with pytest.raises(jaxserve.InvalidRequestError, match="hook='bad' is not registered"):
        engine.generate(input_ids=[3], sampling_params={"hook": "bad"})


def test_a_hook_that_is_taken_away(engine):
    engine.register_hook("again", {"embed": steer}, {"alpha": 0.3}, {"vector": VECTOR})
    engine.unregister_hook("again")
    with pytest.raises(jaxserve.InvalidRequestError, match="name='again' is not registered"):
        engine.unregister_hook("again")
    with pytest.raises(jaxserve.InvalidRequestError, match="hook='again' is not registered"):
        engine.generate(input_ids=[3], sampling_params={"hook": "again"})


LARGE = jnp.ones(20_000)
