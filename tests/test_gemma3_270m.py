"""Gemma 3 270M from its quantized GGUF file, against Hugging Face on the same weights."""

from __future__ import annotations

import pytest
import torch

import converters
import jaxserve
from converters.gguf_config import read_config
from converters.save import save
from jaxserve.models.registry import config_from_hf
from tests import gemma3_270m
from tests.oracles.huggingface import Reference

# a real model: 1.1 GB in float32
pytestmark = [pytest.mark.usefixtures("kept_programs"), pytest.mark.slow, pytest.mark.long]

PROMPT = "The capital of France is"
IDS = [2, 818, 5279, 529, 7001, 563]
GREEDY = [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001, 532]
"""What transformers 5.24 makes of it in float32, from the same file."""
OPTIONS = {"context_length": 1024, "max_running_requests": 4, "chunked_prefill_size": 256}


@pytest.fixture(scope="module")
def path() -> str:
    return str(gemma3_270m.fetch())


@pytest.fixture(scope="module")
def engine(path):
    options = {**OPTIONS, "max_total_tokens": 2048, "precompile": False}
    with jaxserve.Engine(model_path=path, dtype="float32", **options) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


def test_config(path):
    """The file has neither the base of the layers with a window nor the scale of the scores."""
    hf = read_config(path)
    assert hf["_gguf"]["tensor_types"] == {
        "F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9,
    }  # fmt: skip
    config = config_from_hf(hf)
    assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17]
    assert set(config.windows) == {512, None}
    assert (config.layer_ropes[0].theta, config.layer_ropes[5].theta) == (1e4, 1e6)
    assert (config.query_scale, config.head_dim, config.num_layers) == (1 / 16, 256, 18)
    assert config.tie_word_embeddings and config.vocab_size == 262_144


def test_greedy_tokens_are_those_of_hugging_face(engine):
    params = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    result = engine.generate(PROMPT, params, return_prompt_token_ids=True)
    assert result["prompt_token_ids"] == IDS
    assert result["output_ids"] == GREEDY
    text = " the capital of the country of France. It is the largest city in France and"
    assert result["text"] == text


def test_a_prompt_beyond_the_window_in_chunks_and_from_the_cache(engine, path, tmp_path_factory):
    """600 tokens, chunks of 256, window 512: the tokens and logprobs that Hugging Face gives."""
    folder = tmp_path_factory.mktemp("gemma3") / "dequantized"
    save(converters.load(path, dtype="float32"), folder, "safetensors")
    reference = Reference(str(folder))
    prompt = (IDS + GREEDY) * 28
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    results = [
        engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True)
        for _ in range(2)
    ]
    assert results[1]["meta_info"]["cached_tokens"] > 512
    output = results[0]["output_ids"]
    with torch.no_grad():
        logits = reference.model(torch.tensor([prompt + output]), logits_to_keep=5).logits[0, :4]
    want = torch.log_softmax(logits, dim=-1)
    assert output == want.argmax(dim=-1).tolist()
    for result in results:
        assert result["output_ids"] == output
        for row, (logprob, token, _) in zip(
            want, result["meta_info"]["output_token_logprobs"], strict=True
        ):
            assert logprob == pytest.approx(float(row[token]), abs=1e-3)
