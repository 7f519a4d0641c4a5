"""GGUF metadata -> config.json, against transformers' own reading and its RoPE numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converters import gguf_rope
from converters.gguf_config import read_config
from examples.demo_model import fetch
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models.registry import config_from_hf
from tests import gguf_files

SHARED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    "tie_word_embeddings", "bos_token_id", "pad_token_id", "hidden_act",
)  # fmt: skip


def assert_equals_transformers(config, path, *keys):
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for key in SHARED + keys:
        assert config[key] == getattr(theirs, key), key
    assert np.ravel(config["eos_token_id"])[0] == theirs.eos_token_id  # the one that it knows
    assert np.float32(config["rms_norm_eps"]) == np.float32(theirs.rms_norm_eps)
    assert config["rope_parameters"] == theirs.rope_parameters


def write(tmp_path, arch="llama", **options):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path, arch, **options)
    return path


def test_smollm2():
    path = fetch()
    config = read_config(str(path))
    assert_equals_transformers(config, path, "head_dim", "attention_bias", "mlp_bias")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["_gguf"]["tensor_types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    ours = config_from_hf(config)
    assert (ours.num_layers, ours.head_dim, ours.eos_token_ids) == (
        30,
        64,
        (2, 0),
    )  # <|im_end|>, <|endoftext|>


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_tiny_files(tmp_path, arch, tied):
    path = write(tmp_path, arch, tied=tied, head_dim=32)
    config = read_config(str(path))
    assert_equals_transformers(config, path)
    assert config["head_dim"] == 32
    config_from_hf(config)


def test_biases_are_seen(tmp_path):
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config = read_config(str(write(tmp_path, biases=every)))
    assert config["attention_bias"] and config["mlp_bias"]


def test_old_file_without_head_dim_and_rope_base(tmp_path):
    left_out = ("attention.key_length", "attention.value_length", "rope.freq_base", "vocab_size")
    path = write(tmp_path, without=tuple(f"llama.{key}" for key in left_out))
    config = read_config(str(path))
    assert config["head_dim"] == 16
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_llama_with_a_window_is_a_mistral(tmp_path):
    path = write(tmp_path, metadata={"llama.attention.sliding_window": 100})
    config = read_config(str(path))
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config_from_hf(config).windows == (100, 100)


def test_qwen_windows_need_the_pattern(tmp_path):
    window = {"qwen2.attention.sliding_window": 100}
    pattern = {"qwen2.attention.sliding_window_pattern": [False, True]}
    path = write(tmp_path, "qwen2", metadata=window | pattern)
    assert config_from_hf(read_config(str(path))).windows == (None, 100)
    path = write(tmp_path, "qwen2", metadata=window)
    with pytest.raises(NotSupportedError, match="does not tell which layers"):
        read_config(str(path))


def test_ends_of_turn_are_ends(tmp_path):
    path = write(
        tmp_path,
        metadata={"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2},
    )
    assert read_config(str(path))["eos_token_id"] == [2, 0]


def test_per_layer_counts(tmp_path):
    path = write(tmp_path, metadata={"{arch}.attention.head_count_kv": [2, 2]})
    assert read_config(str(path))["num_key_value_heads"] == 2
    path = write(tmp_path, metadata={"{arch}.attention.head_count_kv": [2, 1]})
    with pytest.raises(NotSupportedError, match="differs between layers"):
        read_config(str(path))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("F32", "float32"),
        ("F16", "float16"),
        ("BF16", "bfloat16"),
        ("Q8_0", "float32"),
    ],
)
def test_dtype(tmp_path, kind, expected):
    path = write(tmp_path, quantization=gguf_files.GGMLQuantizationType[kind])
    assert read_config(str(path))["dtype"] == expected


def test_unsupported_architecture_lists_the_supported(tmp_path):
    path = write(tmp_path, "starcoder2")
    with pytest.raises(NotSupportedError, match=r"'starcoder2'.*llama, cohere2, .*, smollm3"):
        read_config(str(path))


class TestFamilies:
    """What llama.cpp's converter writes for a family, and what it leaves out."""

    def read(self, tmp_path, arch, metadata=None, **options):
        pairs = {f"{arch}.{key}": value for key, value in (metadata or {}).items()}
        return config_from_hf(read_config(str(write(tmp_path, arch, metadata=pairs, **options))))

    def test_gemma2(self, tmp_path):
        found = self.read(tmp_path, "gemma2", layers=3, head_dim=32)
        assert found.windows == (4096, None, 4096)
        assert (found.score_cap, found.logit_cap) == (50.0, 30.0)
        assert (found.query_scale, found.embed_scale) == (32**-0.5, 8.0)
        assert found.hidden_act == "gelu_pytorch_tanh"
        caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
        window = {"attention.sliding_window": 7}
        found = self.read(tmp_path, "gemma2", caps | window, layers=46, hidden=80, head_dim=32)
        assert (found.score_cap, found.logit_cap, found.windows[0]) == (20.0, 10.0, 7)
        assert found.query_scale == 20**-0.5  # the 27B model's is that of D / N

    def test_gemma3(self, tmp_path):
        linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
        window = {"attention.sliding_window": 512}
        found = self.read(tmp_path, "gemma3", linear | window, layers=7)
        assert found.windows == (512,) * 5 + (None, 512)
        assert found.qk_norm and found.score_cap is found.logit_cap is None
        assert (found.rope.type, found.rope.factor, found.rope.theta) == ("linear", 8.0, 1e6)
        assert (found.layer_ropes[5], found.layer_ropes[0].theta) == (found.rope, 1e4)
        assert (found.layer_ropes[0].type, found.context_length) == ("default", 512)
        pattern = {"attention.sliding_window_pattern": [False, True], "rope.freq_base_swa": 2e4}
        found = self.read(tmp_path, "gemma3", window | pattern)
        assert found.windows == (None, 512)
        assert (found.layer_ropes[1].theta, self.read(tmp_path, "gemma3").window) == (2e4, None)

    def test_granite(self, tmp_path):
        found = self.read(tmp_path, "granite", {
            "attention.scale": 0.0625, "embedding_scale": 12.0, "residual_scale": 0.25,
            "logit_scale": 8.0,
        })  # fmt: skip
        assert (found.query_scale, found.embed_scale) == (0.0625, 12.0)
        assert (found.residual_scale, found.logit_scale) == (0.25, 0.125)
        found = self.read(tmp_path, "granite", head_dim=64)
        assert (found.query_scale, found.residual_scale) == (0.125, 1.0)

    def test_olmo2_and_3(self, tmp_path):
        assert self.read(tmp_path, "olmo2").architecture == "Olmo2ForCausalLM"
        scaling = {"type": "yarn", "factor": 8.0, "attn_factor": 1.25, "original_context_length": 9}
        window = {"attention.sliding_window": 5, "rope.freq_base": 5e5}
        window |= {f"rope.scaling.{key}": value for key, value in scaling.items()}
        found = self.read(tmp_path, "olmo2", window, layers=4)
        assert (found.architecture, found.windows) == ("Olmo3ForCausalLM", (5, 5, 5, None))
        assert (found.rope.type, found.rope.attention_factor) == ("yarn", 1.25)
        assert {(rope.type, rope.theta) for rope in found.layer_ropes[:3]} == {("default", 5e5)}

    def test_smollm3(self, tmp_path):
        found = self.read(tmp_path, "smollm3", layers=5)
        assert [rope.partial for rope in found.layer_ropes] == [1, 1, 1, 0, 1]

    @pytest.mark.parametrize("key", ["attention.scale", "logit_scale", "attn_logit_softcapping"])
    def test_keys_of_other_families_are_refused(self, tmp_path, key):
        with pytest.raises(NotSupportedError, match=f"gemma3.{key}=0.5 is not supported"):
            self.read(tmp_path, "gemma3", {key: 0.5})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ({"llama.attention.causal": False}, "causal"),
        ({"llama.rope.dimension_count": 8}, "partial rotation"),
        ({"llama.attention.value_length": 8}, "value_length=8"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    ],
)
def test_unsupported_features(tmp_path, pairs, message):
    path = write(tmp_path, metadata=pairs)
    with pytest.raises(NotSupportedError, match=message):
        read_config(str(path))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"llama.vocab_size": 7}, "rows"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id=9999"),
        ({"llama.attention.head_count": 0}, "must be positive"),
        ({"llama.rope.freq_base": 0.5}, "must be at least 1"),
    ],
)
def test_values_that_do_not_fit(tmp_path, pairs, message):
    path = write(tmp_path, metadata=pairs)
    with pytest.raises(ModelLoadError, match=message):
        read_config(str(path))


def test_linear_scaling_new_and_old_keys(tmp_path):
    new = {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 4.0}
    untyped = {"{arch}.rope.scaling.factor": 4.0}
    old = {"{arch}.rope.scale_linear": 4.0}
    for pairs in (new, untyped, old):
        parameters = read_config(str(write(tmp_path, metadata=pairs)))["rope_parameters"]
        assert parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_yarn(tmp_path):
    path = write(
        tmp_path,
        "qwen2",
        metadata={
            "{arch}.rope.scaling.type": "yarn",
            "{arch}.rope.scaling.factor": 4.0,
            "{arch}.rope.scaling.original_context_length": 128,
            "{arch}.rope.scaling.yarn_beta_fast": 16.0,
        },
    )
    config = read_config(str(path))
    assert config["rope_parameters"] == {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
    }
    assert config_from_hf(config).rope.factor == 4.0


def factors_of_transformers(parameters, theta, head_dim):
    """The converter's tensor: plain frequency / scaled frequency, float32."""
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **parameters},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float().numpy()


@pytest.mark.parametrize(
    "parameters",
    [
        # Llama 3.1 (8), 3.2 (32), and one that nobody released.
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "context": 8192},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "context": 8192},
        {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0, "context": 4096},
        {"factor": 16.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "context": 16384},
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_scaling_is_recovered(tmp_path, parameters, head_dim):
    parameters = dict(parameters)
    parameters["original_max_position_embeddings"] = parameters.pop("context")
    factors = factors_of_transformers(parameters, 500000.0, head_dim)
    path = write(
        tmp_path,
        head_dim=head_dim,
        metadata={"llama.rope.freq_base": 500000.0},
        extra={gguf_rope.FACTORS: factors},
    )
    got = read_config(str(path))["rope_parameters"]
    assert got["rope_type"] == "llama3"
    again = factors_of_transformers(
        {key: value for key, value in got.items() if key not in ("rope_type", "rope_theta")},
        500000.0,
        head_dim,
    )
    np.testing.assert_allclose(again, factors, rtol=1e-4)
    # The scale of (low, high, context) is free; the fit's is low = 1.
    scale = parameters["low_freq_factor"]
    for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert got[key] == pytest.approx(parameters[key] / scale, rel=1e-3), key


def test_factors_of_one_mean_no_scaling(tmp_path):
    path = write(tmp_path, extra={gguf_rope.FACTORS: np.ones(8, np.float32)})
    assert read_config(str(path))["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    "factors",
    [np.linspace(1, 8, 8), np.full(8, np.nan), np.full(8, np.inf), np.ones(4), np.full(8, 0.5)],
)
def test_other_factors_are_refused(tmp_path, factors):
    path = write(tmp_path, extra={gguf_rope.FACTORS: factors.astype(np.float32)})
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight"):
        read_config(str(path))
