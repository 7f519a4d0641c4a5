"""RoPE frequencies against transformers' ROPE_INIT_FUNCTIONS."""

from __future__ import annotations

import dataclasses

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
HALF = {"partial_rotary_factor": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.05 * i for i in range(12)],
    "long_factor": [1.0 + 0.9 * i for i in range(12)],
    "partial_rotary_factor": 0.75,
}
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
    "longrope": (LONGROPE, 32, 10_000.0),
    "longrope, whole head": (LONGROPE | {"partial_rotary_factor": 1.0}, 24, 10_000.0),
    "longrope, factor": (LONGROPE | {"factor": 8.0}, 32, 500_000.0),
    "longrope, attention_factor": (LONGROPE | {"attention_factor": 1.5}, 32, 10_000.0),
    "linear, partial": ({"rope_type": "linear", "factor": 2.5, **HALF}, 64, 10_000.0),
    "yarn, partial": (YARN | HALF, 128, 1_000_000.0),
    "llama 3.1, partial": (LLAMA31 | HALF, 128, 500_000.0),
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
    function = ROPE_INIT_FUNCTIONS.get(parameters["rope_type"], default)
    ours = RopeConfig.from_hf(
        {"rope_parameters": parameters | {"rope_theta": theta}}, MAX_POSITIONS
    )
    for context in (4096, 4097) if ours.type == "longrope" else (MAX_POSITIONS,):
        theirs, factor = function(config, seq_len=context)
        found = inverse_frequencies(ours.within(context), head_dim)
        np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-6)
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
    ours = cos_sin(rope.within(4001), head_dim, jnp.asarray(positions))
    half = cos.shape[-1] // 2
    for mine, theirs, still in zip(ours, (cos, sin), (1, 0), strict=True):
        # one unit in the last place of a frequency is 4000 * 6e-8 radians
        np.testing.assert_allclose(mine[:, :half], theirs[0, :, :half].numpy(), atol=5e-4)
        assert mine.shape == (len(positions), head_dim // 2)
        np.testing.assert_array_equal(mine[:, half:], still)  # whatever the attention factor


def test_no_rotation_at_all():
    cos, sin = cos_sin(RopeConfig(partial=0.0), 16, jnp.asarray([0, 7, 100_000]))
    np.testing.assert_array_equal(cos, np.ones((3, 8)))
    np.testing.assert_array_equal(sin, np.zeros((3, 8)))


def test_longrope_is_long_where_the_context_is():
    given = {"rope_scaling": {**LONGROPE, "type": "su"}, "original_max_position_embeddings": 4096}
    rope = RopeConfig.from_hf(given, MAX_POSITIONS)
    assert (rope.type, rope.long, rope.context_factor) == ("longrope", True, 1)
    assert (rope.within(4096).long, rope.within(4097).long) == (False, True)
    assert RopeConfig.from_hf(given, 4096) == dataclasses.replace(
        rope, factor=1.0, attention_factor=1.0, long=False
    )
    other = RopeConfig.from_hf({"rope_parameters": YARN}, MAX_POSITIONS)
    assert other.within(5) == other


@pytest.mark.parametrize(
    ("parameters", "head_dim", "match"),
    [
        (LONGROPE, 64, "short_factor .* must be 24 numbers.* got 12"),
        (LONGROPE | {"long_factor": [1.0]}, 32, "long_factor .* must be 12 numbers.* got 1"),
        (HALF, 6, r"partial_rotary_factor=0\.5 of head_dim=6 is 3 dimensions"),
        ({"rope_type": "dynamic", "factor": 2.0, **HALF}, 4, "head_dim=4 has no dynamic RoPE"),
    ],
)
def test_heads_that_cannot_be_rotated_so(parameters, head_dim, match):
    rope = RopeConfig.from_hf({"rope_parameters": parameters}, MAX_POSITIONS)
    with pytest.raises(ModelLoadError, match=match):
        rope.check(head_dim)


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
        ({"rope_type": "3d"}, NotSupportedError, "'3d'; supported: default.*longrope"),
        ({"rope_type": "linear"}, ModelLoadError, "needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, ModelLoadError, "low_freq_factor, high_freq_f"),
        (
            {"partial_rotary_factor": 1.5},
            ModelLoadError,
            "partial_rotary_factor must be at most 1",
        ),
        ({"partial_rotary_factor": 0}, ModelLoadError, "partial_rotary_factor must .* above 0"),
        (
            {"rope_type": "longrope", "factor": 2.0},
            ModelLoadError,
            "short_factor, long_factor, orig",
        ),
        (LONGROPE | {"long_factor": 2.0}, ModelLoadError, "long_factor must be a list of numbers"),
        (
            LONGROPE | {"short_factor": [1.0, 0.0]},
            ModelLoadError,
            "short_factor must .* above 0",
        ),
    ],
)
def test_errors(parameters, error, match):
    with pytest.raises(error, match=match):
        RopeConfig.from_hf({"rope_parameters": parameters}, 4096)


M_ROPE = {"mrope_section": [16, 24, 24]}


@pytest.mark.parametrize("spelling", [{"type": "mrope"}, {"rope_type": "default"}])
def test_three_positions(spelling):
    """Of Qwen2-VL: each pair turns by one of them."""
    rope = RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": M_ROPE | spelling}, 32768)
    assert (rope.type, rope.sections, rope.sections_interleaved) == ("default", (16, 24, 24), False)
    positions = np.arange(15, dtype=np.int32).reshape(3, 5) ** 2
    three = cos_sin(rope, 128, jnp.asarray(positions))
    each = [cos_sin(rope, 128, jnp.asarray(axis)) for axis in positions]
    for got, *of in zip(three, *each, strict=True):
        want = np.concatenate([of[0][:, :16], of[1][:, 16:40], of[2][:, 40:]], axis=1)
        np.testing.assert_array_equal(got, want)


def test_three_positions_in_turn():
    """Of Qwen3-VL: as long as row and column have pairs."""
    given = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}
    rope = RopeConfig.from_hf({"rope_parameters": given | {"rope_theta": 5e6}}, 32768)
    _, sin = cos_sin(rope, 128, jnp.asarray([[0], [1], [2]], jnp.int32))
    one, two = (np.sin(step * inverse_frequencies(rope, 128)) for step in (1, 2))
    want = np.zeros(64, np.float32)
    want[1:60:3], want[2:60:3] = one[1:60:3], two[2:60:3]
    np.testing.assert_allclose(sin[0], want, rtol=0, atol=1e-6)


def test_sections_go_with_other_types():
    given = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": M_ROPE | given}, 32768)
    assert (rope.type, rope.sections) == ("yarn", (16, 24, 24))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mrope_section": [16, 24]}, ModelLoadError, "mrope_section must be three integers"),
        ({"mrope_section": [64, 0, 0]}, ModelLoadError, "mrope_section must be a positive"),
        (M_ROPE | {"type": "dynamic", "factor": 2.0}, NotSupportedError, "with rope type 'dyn"),
    ],
)
def test_sections_that_cannot_be(given, error, message):
    with pytest.raises(error, match=message):
        RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": {"type": "mrope"} | given}, 32768)
