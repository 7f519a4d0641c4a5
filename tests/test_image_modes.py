"""Images in requests that ask for more than tokens, and in engines with other options."""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxserve import NotSupportedError
from jaxserve.transforms import Transform
from tests.oracles.vision import BIAS
from tests.pictures import noise
from tests.test_images import GREEDY, NEW, PROMPTS, SIZES, Model, run
from tests.vision_models import IMAGE

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
IMAGES = [noise(*size, seed=seed) for seed, size in enumerate(SIZES)]
POINTS = ("layer.0.mlp", "layer.2.mlp")
"""Rows of a tower are added behind the first."""
SEEDED = {**GREEDY, "temperature": 0.9, "sampling_seed": 7, "max_new_tokens": 12}


def different(logits, state, params, context):
    """No token follows itself."""
    return jnp.where(jnp.arange(logits.shape[0]) == context.last_token, -jnp.inf, logits)


def scale(x, params, context):
    return x * params["by"]


@contextlib.contextmanager
def scaled(model, layers, by):
    """The same behind layers of Hugging Face's decoder, before what deepstack adds."""
    modules = [model.hf.model.model.language_model.layers[layer] for layer in layers]
    handles = [each.register_forward_hook(lambda _, x, y: y * by) for each in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three positions a token, and rows added to the stream after layers."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    found = Model("qwen3_vl", folder, precompile=False, enable_return_hidden_states=True)
    yield found
    found.engine.shutdown()


def shown(which):
    return [IMAGES[n] for n in which]


def test_logprobs_and_hidden_states_of_prompts(model):
    """What the model makes of a placeholder is that of any token."""
    model.engine.flush_cache()
    results = run(model, PROMPTS, IMAGES, logprob_start_len=0, return_hidden_states=True)
    for result, (_, which) in zip(results, PROMPTS, strict=True):
        images = shown(which)
        model.check(result, images)
        prompt, outputs, meta = (
            result["prompt_token_ids"],
            result["output_ids"],
            result["meta_info"],
        )
        logits = model.hf.logprobs(prompt[:1], [*prompt[1:], *outputs], images)
        logits[:, IMAGE] += BIAS
        expected = torch.from_numpy(logits).log_softmax(-1).numpy()
        first, *others = meta["input_token_logprobs"]
        assert first[0] is None and [token for _, token, _ in (first, *others)] == prompt
        wanted = expected[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose([value for value, *_ in others], wanted, atol=1e-4)
        states = np.vstack(meta["hidden_states"])
        wanted = model.hf.hidden_states([*prompt, *outputs[:-1]], images)
        assert len(states) == len(prompt) + NEW - 1
        np.testing.assert_allclose(states, wanted, atol=1e-3)


@pytest.mark.long
def test_transforms_and_hooks(model):
    model.engine.register("different", Transform(different))
    model.engine.register_hook("scaled", dict.fromkeys(POINTS, scale), {"by": 1.5})
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    params = [{"transform": "different"}, {"hook": "scaled"}, {}]
    results = model.engine.generate(
        input_ids=[model.spread(ids, shown(which)) for ids, which in prompts],
        image_data=[shown(which) for _, which in prompts],
        sampling_params=[{**GREEDY, **each} for each in params],
        return_prompt_token_ids=True,
        return_logprob=True,
    )
    changed, hooked, plain = results
    model.check(plain, [])
    with scaled(model, (0, 2), 1.5):
        model.check(hooked, shown(PROMPTS[2][1]))
    prompt, outputs = changed["prompt_token_ids"], changed["output_ids"]
    expected = model.hf.logprobs(prompt, outputs, shown(PROMPTS[0][1]))
    expected[np.arange(NEW), [prompt[-1], *outputs[:-1]]] = -np.inf
    assert expected.argmax(-1).tolist() == outputs


@pytest.mark.long
def test_samples_share_their_images(model):
    ids, which = PROMPTS[2]
    call = {"input_ids": ids, "image_data": shown(which), "sampling_params": {**SEEDED, "n": 3}}
    model.engine.flush_cache()
    samples = [result["output_ids"] for result in model.engine.generate(**call)]
    assert len({tuple(sample) for sample in samples}) == 3
    again = [result["output_ids"] for result in model.engine.generate(**call)]
    assert again == samples


@pytest.mark.long
def test_prompts_with_images_come_back_from_host_memory(model):
    engine = model.start(
        precompile=False, max_total_tokens=256, enable_hierarchical_cache=True, hicache_ratio=8.0
    )
    try:
        prompts = [([number, *ids], which) for number in (5, 6, 7) for ids, which in PROMPTS[2:4]]

        def answers():
            return [
                engine.generate(
                    input_ids=ids, image_data=shown(which), sampling_params=GREEDY,
                    return_prompt_token_ids=True, return_logprob=True,
                )
                for ids, which in prompts
            ]  # fmt: skip

        first, again = answers(), answers()
        for result, (_, which) in zip(again, prompts, strict=True):
            model.check(result, shown(which))
        assert [x["output_ids"] for x in again] == [x["output_ids"] for x in first]
        assert engine.get_server_info()["cached_host_tokens"] >= 40
    finally:
        engine.shutdown()


@pytest.mark.long
def test_deterministic_inference(model):
    """Alone, beside others and cached, in several chunks: the same bits."""
    engine = model.start(
        enable_deterministic_inference=True, chunked_prefill_size=128, precompile=False,
        cuda_graph_bs=None,
    )  # fmt: skip
    try:
        prompts = [([5, 6, *[IMAGE, 9] * 5], [0, 1, 0, 2, 0]), *PROMPTS]
        call = {"sampling_params": SEEDED, "return_logprob": True, "logprob_start_len": 0}
        ids, which = prompts[0]
        alone = engine.generate(input_ids=ids, image_data=shown(which), **call)
        assert alone["meta_info"]["prompt_tokens"] > 128
        call["logprob_start_len"] = -1
        for _ in range(2):
            beside = engine.generate(
                input_ids=[ids for ids, _ in prompts],
                image_data=[shown(which) for _, which in prompts],
                **call,
            )[0]
            assert beside["output_ids"] == alone["output_ids"]
            mine, other = (x["meta_info"]["output_token_logprobs"] for x in (beside, alone))
            assert mine == other
        assert beside["meta_info"]["cached_tokens"] == 128
    finally:
        engine.shutdown()


@pytest.mark.long
def test_deterministic_inference_takes_no_pictures_that_are_blocks(tmp_path):
    options = {"enable_deterministic_inference": True, "precompile": False, "cuda_graph_bs": None}
    found = Model("gemma3", tmp_path, **options)
    try:
        with pytest.raises(NotSupportedError, match="enable_deterministic_inference=True takes no"):
            found.engine.generate(input_ids=[5, IMAGE], image_data=IMAGES[0])
        (text,) = run(found, PROMPTS[1:2], IMAGES)
        found.check(text, [])
    finally:
        found.engine.shutdown()
