"""What clients read off a running engine: `engine.tokenizer_manager`, `engine.server_args`,
`engine.get_tokenizer()`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxserve
from tests.api_fakes import Fakes, byte_level_tokenizer

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(model):
    options = {"max_total_tokens": 256, "context_length": 96, "served_model_name": "tiny"}
    with jaxserve.Engine(model_path=model, **options) as engine:
        yield engine


def test_lengths_that_harnesses_cut_prompts_to(engine):
    manager = engine.tokenizer_manager
    assert manager.context_len == manager.model_config.context_len == 96
    assert manager.max_req_input_len == engine.get_server_info()["max_req_input_len"] == 95
    params = {"max_new_tokens": 1}
    assert engine.generate(input_ids=[5] * manager.max_req_input_len, sampling_params=params)
    with pytest.raises(ValueError, match="longer than the model's context length"):
        engine.generate(input_ids=[5] * (manager.max_req_input_len + 1), sampling_params=params)


def test_names(engine, model):
    manager = engine.tokenizer_manager
    assert (manager.model_path, manager.served_model_name) == (model, "tiny")
    assert manager.is_generation is True and manager.model_config.is_generation is True
    assert manager.server_args is engine.server_args
    assert engine.get_tokenizer() is engine.tokenizer
    assert engine.get_tokenizer().decode(engine.get_tokenizer()("hello")["input_ids"])


def test_the_models_sizes(engine, model):
    raw = json.loads((Path(model) / "config.json").read_text())
    facts = engine.tokenizer_manager.model_config
    assert facts.vocab_size == raw["vocab_size"] and facts.hidden_size == raw["hidden_size"]
    assert facts.num_hidden_layers == raw["num_hidden_layers"]
    assert facts.num_attention_heads == raw["num_attention_heads"]
    assert facts.num_key_value_heads == raw["num_key_value_heads"]
    assert facts.dtype in ("float32", "bfloat16")
    config = facts.hf_config
    assert config.model_type == "llama" and config.vocab_size == raw["vocab_size"]
    assert config.architectures == raw["architectures"] and facts.hf_text_config is config


def test_a_pool_that_is_shorter_than_the_context(monkeypatch):
    fakes = Fakes(byte_level_tokenizer(), monkeypatch)
    engine = fakes.engine(context_length=512, max_total_tokens=128, skip_tokenizer_init=True)
    manager = engine.tokenizer_manager
    assert (manager.context_len, manager.max_req_input_len) == (512, 127)
    assert manager.served_model_name == "fake" and engine.get_tokenizer() is None
    fakes.close()


@pytest.mark.slow
def test_original_logprobs_by_the_environment(model, monkeypatch, engine):
    """The environment's word changes what a sampled token's logprob is."""
    call = {
        "input_ids": [5, 6, 7],
        "sampling_params": {"temperature": 0.25, "max_new_tokens": 1, "sampling_seed": 3},
        "return_logprob": True,
    }
    scaled = engine.generate(**call)["meta_info"]["output_token_logprobs"][0]
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "true")
    with jaxserve.Engine(model_path=model, max_total_tokens=256) as other:
        plain = other.generate(**call)["meta_info"]["output_token_logprobs"][0]
    assert scaled[1] == plain[1] and abs(scaled[0] - plain[0]) > 0.1
