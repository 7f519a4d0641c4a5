"""RoPE frequencies against transformers' ROPE_INIT_FUNCTIONS."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models.rope import RopeConfig, cos_sin, inverse_frequencies

torch = pytest.importorskip("torch")

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES = {
    "default": ({"rope_type": "default"}, 128, 10_000.0),
    "default, other base": ({"rope_type": "default"}, 64, 1_000_000.0),
    "linear": ({"rope_type": "linear", "factor": 2.5}, 64, 10_000.0),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 64, 10_000.0),
    "llama 3.1": (LLAMA31, 128, 500_000.0),
    "llama 3.2": (LLAMA31 | {"factor": 32.0}, 64, 500_000.0),
    "yarn, qwen2.5": (YARN, 128, 1_000_000.0),
    "yarn, attention_factor": (YARN | {"attention_factor": 1.25}, 64, 10_000.0),
    "yarn, mscale": (YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, 64, 10_000.0),
    "yarn, betas": (YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, 64, 10_000.0),
    "yarn, not truncated": (YARN | {"truncate": False}, 128, 10_000.0),
    "yarn, small head": (YARN | {"original_max_position_embeddings": 64}, 16, 10_000.0),
}
MAX_POSITIONS = 131072


def hf_config(parameters: dict, head_dim: int, theta: float):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=parameters | {"rope_theta": theta},
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factor(name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, head_dim, theta = CASES[name]
    config = hf_config(dict(parameters), head_dim, theta)
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    theirs, factor = ROPE_INIT_FUNCTIONS.get(parameters["rope_type"], default)(config)
    ours = RopeConfig.from_hf(
        {"rope_parameters": parameters | {"rope_theta": theta}}, MAX_POSITIONS
    )
    np.testing.assert_allclose(inverse_frequencies(ours, head_dim), theirs.numpy(), rtol=1e-6)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_cos_and_sin(name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, head_dim, theta = CASES[name]
    positions = np.array([0, 1, 5, 100, 1000, 4000])
    module = LlamaRotaryEmbedding(hf_config(dict(parameters), head_dim, theta))
    cos, sin = module(torch.zeros(1), torch.from_numpy(positions)[None])
    rope = RopeConfig.from_hf(
        {"rope_parameters": parameters | {"rope_theta": theta}}, MAX_POSITIONS
    )
    ours = cos_sin(rope, head_dim, jnp.asarray(positions))
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        # one unit in the last place of a frequency is 4000 * 6e-8 radians
        np.testing.assert_allclose(mine, theirs[0, :, : head_dim // 2].numpy(), atol=5e-4)


def test_dynamic_depends_on_the_token_alone():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "dynamic", "factor": 2.0}
    config = hf_config(parameters, 64, 10_000.0)
    config.max_position_embeddings = 100
    rope = RopeConfig.from_hf({"rope_scaling": parameters}, 100)
    positions = np.array([0, 50, 99, 100, 101, 150, 399])
    together = cos_sin(rope, 64, jnp.asarray(positions))
    plain = cos_sin(RopeConfig(), 64, jnp.asarray(positions))
    for i, position in enumerate(positions):
        alone = cos_sin(rope, 64, jnp.asarray([position]))
        np.testing.assert_array_equal(alone[0][0], together[0][i])
        if position < 100:  # inside: the unscaled frequencies, bit for bit
            np.testing.assert_array_equal(together[1][i], plain[1][i])
            continue
        theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[position]]))
        np.testing.assert_allclose(together[0][i], theirs[0][0, 0, :32].numpy(), atol=1e-4)


def test_spellings():
    new = {"rope_parameters": LLAMA31 | {"rope_theta": 5e5}}
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA31}
    older = {"rope_theta": 5e5, "rope_scaling": {**LLAMA31, "type": LLAMA31["rope_type"]}}
    del older["rope_scaling"]["rope_type"]
    configs = {RopeConfig.from_hf(hf, MAX_POSITIONS) for hf in (new, old, older)}
    assert len(configs) == 1
    assert RopeConfig.from_hf({"rope_scaling": None}, 10) == RopeConfig()
    overridden = new | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert RopeConfig.from_hf(overridden, 10).theta == 5e5


def test_yarn_without_factor_takes_the_ratio():
    parameters = {**YARN, "factor": None}
    rope = RopeConfig.from_hf({"rope_scaling": parameters}, MAX_POSITIONS)
    assert rope.factor == MAX_POSITIONS / 32768


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, NotSupportedError, "longrope.*supported: def"),
        ({"rope_type": "linear"}, ModelLoadError, "needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, ModelLoadError, "low_freq_factor, high_freq_f"),
        ({"partial_rotary_factor": 0.5}, NotSupportedError, r"partial_rotary_factor=0\.5"),
    ],
)
def test_errors(parameters, error, match):
    with pytest.raises(error, match=match):
        RopeConfig.from_hf({"rope_parameters": parameters}, 4096)
