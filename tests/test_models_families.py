"""Families that are not Llama's kind against Hugging Face in float32, whole and where their
mathematics differ; the engine's side of it is in test_engine_families.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import converters
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import registry
from jaxserve.models.make import Make
from jaxserve.models.olmo2 import WholeNorm
from jaxserve.models.rope import cos_sin, inverse_frequencies
from jaxserve.models.rope_config import NO_ROPE
from jaxserve.weights import repeat_kv_heads
from tests.checkpoints import make_checkpoint, make_config
from tests.marks import long
from tests.test_models_hf import (
    OPS,
    T,
    call,
    close,
    hf_logits,
    hf_model,
    load_pair,
    our_logits,
    random_ids,
    scaled,
)

torch = pytest.importorskip("torch")
DEEP = {"num_hidden_layers": 4, "layer_types": None}
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
OLD_GEMMA = {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
FULL, SLIDING = KINDS = ["full_attention", "sliding_attention"]
SWITCHED = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0],
    },
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "gemma2": ("gemma2", {}),
    "gemma2 as it is": ("gemma2", DEEP | {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma2 without caps": ("gemma2", {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 1,
    }),
    "gemma3": ("gemma3", {}),
    "gemma3 as it is": ("gemma3", {
        "num_hidden_layers": 7, "layer_types": None, "tie_word_embeddings": True,
    }),
    "gemma3 in old spelling": ("gemma3", OLD_GEMMA | {
        "rope_scaling": LINEAR, "num_hidden_layers": 4, "layer_types": None,
        "sliding_window_pattern": 3, "final_logit_softcapping": 3.0,
    }),
    "gemma3 by default": ("gemma3", {"rope_parameters": None}),
    "granite": ("granite", {}),
    "granite with biases, tied": ("granite", {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    }),
    "granite without multipliers": ("granite", {
        "embedding_multiplier": 1.0, "attention_multiplier": 0.25, "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo2, one kv head": ("olmo2", {"num_key_value_heads": 1}),
    "olmo2, no grouping": ("olmo2", {"num_key_value_heads": 4}),
    "olmo3": ("olmo3", {}),
    "olmo3 as it is": ("olmo3", DEEP | {"rope_parameters": {
        "full_attention": YARN | {"rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    }}),
    "olmo3 in old spelling": ("olmo3", {
        "rope_parameters": None, "rope_theta": 5e5, "rope_scaling": YARN,
    }),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3 as it is": ("smollm3", {
        "num_hidden_layers": 4, "no_rope_layer_interval": 4, "rope_parameters": None,
    }),
    "smollm3 by a list": ("smollm3", {
        "no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True,
    }),
    "smollm3 with a window": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "smollm3 by layer types": ("smollm3", {
        "use_sliding_window": True, "sliding_window": 8, "layer_types": KINDS,
        "no_rope_layers": [0, 1],
    }),
    "phi3": ("phi3", {}),
    "phi3, no part, no scaling, a window": ("phi3", {
        "rope_parameters": scaled("default"), "sliding_window": 8,
    }),
    "phi3, transformers 4 spelling": ("phi3", {
        "rope_parameters": None, "rope_theta": 5e5, "partial_rotary_factor": 0.5,
        "tie_word_embeddings": True, "rope_scaling": {
            "type": "longrope", "short_factor": [1.5] * 4, "long_factor": [1.5] * 4,
        },
    }),
    "glm": ("glm", {}),
    "glm, no bias, a quarter": ("glm", {"attention_bias": False, "partial_rotary_factor": 0.25}),
    "glm4": ("glm4", {}),
    "glm4, no bias, all": ("glm4", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    "glm4, linear": ("glm4", {
        "rope_parameters": scaled("linear", factor=4.0, partial_rotary_factor=0.5),
    }),
    "cohere2": ("cohere2", {"tie_word_embeddings": True}),
    "cohere2, biases": ("cohere2", {"attention_bias": True}),
    "cohere2, layer types": ("cohere2", {
        "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    family, overrides = VARIANTS[name]
    pair = load_pair(make_checkpoint(tmp_path, family, tokenizer=False, **overrides))
    ids = random_ids(seed=7)
    want = hf_logits(pair.hf, ids)
    close(our_logits(pair.ours, ids), want, 1e-4)
    theirs = pair.hf.config
    types = getattr(theirs, "layer_types", None) or [SLIDING] * pair.config.num_layers
    window = getattr(theirs, "sliding_window", None)
    assert list(pair.config.windows) == [window if kind == SLIDING else None for kind in types]


@pytest.mark.parametrize("family", ["phi3", "glm", "glm4", "cohere2"])
def test_what_each_layer_reads(family, tmp_path):
    """Embeddings and every layer's output, as Hugging Face's."""
    pair = load_pair(make_checkpoint(tmp_path, family, tokenizer=False))
    ids = random_ids(seed=9)
    seen = []
    pair.ours(
        jnp.asarray(ids), jnp.arange(T), None, None, OPS, lambda _, stream: seen.append(stream.x)
    )
    with torch.no_grad():
        out = pair.hf(torch.from_numpy(ids).long()[None], output_hidden_states=True)
    assert len(seen) == pair.config.num_layers
    for ours, theirs in zip(seen, out.hidden_states, strict=False):
        close(ours, theirs[0].numpy())


@pytest.mark.long
def test_longrope_on_both_sides_of_the_original_context(tmp_path):
    """Hugging Face goes by the sequence, we by what the engine is for: up to 32 tokens, or more."""
    path = make_checkpoint(tmp_path, "phi3", tokenizer=False, **SWITCHED)
    hf, differences = hf_model(path), []
    for context, lengths in ((32, (20, 32)), (33, (33, 60)), (None, (33, 60))):
        loaded = converters.load(path, dtype="float32", context_length=context)
        model = loaded.declaration.bind(loaded.params)
        for length in lengths:
            ids = random_ids(length, seed=length)
            close(our_logits(model, ids), hf_logits(hf, ids), 1e-4)
        ids = random_ids(20)
        differences.append(np.abs(our_logits(model, ids) - hf_logits(hf, ids)).max())
    assert differences[0] < 1e-4 < 1e-2 < differences[1] == differences[2]


@pytest.mark.parametrize("family", ["gemma3", "olmo3"])
def test_frequencies_by_kind_of_layer(family, tmp_path):
    pair = load_pair(make_checkpoint(tmp_path, family, tokenizer=False))
    theirs = pair.hf.model.rotary_emb
    sliding, full = pair.config.layer_ropes
    for rope, name in ((sliding, "sliding_attention"), (full, "full_attention")):
        want = getattr(theirs, f"{name}_inv_freq").numpy()
        ours = inverse_frequencies(rope, pair.config.head_dim)
        np.testing.assert_allclose(ours, want, rtol=1e-6)
    assert (pair.config.rope, full.theta / sliding.theta) == (full, 100)
    # the context that a config states is the stretched one
    assert pair.config.context_length == 1024


def test_layers_without_rope_turn_nothing():
    cos, sin = cos_sin(NO_ROPE, 8, jnp.asarray([0, 1, 100_000]))
    np.testing.assert_array_equal(cos, np.ones((3, 4)))
    np.testing.assert_array_equal(sin, np.zeros((3, 4)))
    config = registry.config_from_hf(make_config("smollm3", num_hidden_layers=3))
    assert [rope == NO_ROPE for rope in config.layer_ropes] == [False, True, False]


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_in_bfloat16(family, tmp_path):
    """Norms add their 1 in float32, and the embedding's scale is rounded to bfloat16: bit for bit
    what Hugging Face does there."""
    path = make_checkpoint(tmp_path, family, dtype="bfloat16", tokenizer=False, hidden_size=72)
    loaded = converters.load(path, dtype="bfloat16")
    ours, theirs = loaded.declaration.bind(loaded.params), hf_model(path).to(torch.bfloat16)
    assert ours.final_norm.scale[...].dtype == jnp.float32
    ids = random_ids()
    with torch.no_grad():
        rows = theirs.model.embed_tokens(torch.from_numpy(ids).long())
        normed = theirs.model.layers[1].pre_feedforward_layernorm(rows)
    embedded = ours.embed(jnp.asarray(ids))
    np.testing.assert_array_equal(embedded.astype(jnp.float32), rows.float().numpy())
    norm = ours.layers[1].post_norm
    assert norm is not None
    mine = norm(embedded).astype(jnp.float32)
    np.testing.assert_allclose(mine, normed.float().numpy(), rtol=2**-7)
    assert np.mean(np.asarray(mine) == normed.float().numpy()) > 0.99


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    return load_pair(make_checkpoint(tmp_path_factory.mktemp("olmo2"), "olmo2", tokenizer=False))


class TestWholeNorm:
    """RMSNorm over all heads of q, and of k: on one device, and cut over several."""

    T = 5

    def case(self, pair):
        """qkv, and what is to come of it."""
        config, theirs = pair.config, pair.hf.model.layers[1].self_attn
        rng = np.random.default_rng(0)
        q, k, v = (
            rng.standard_normal((self.T, heads * config.head_dim)).astype(np.float32)
            for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        )
        fused = [
            np.concatenate([x.reshape(self.T, config.num_kv_heads, -1) for x in parts], axis=2)
            for parts in ((q, k, v), (call(theirs.q_norm, q), call(theirs.k_norm, k), v))
        ]
        return (x.reshape(self.T, -1) for x in fused)  # fmt: skip

    def test_on_one_device(self, olmo):
        qkv, want = self.case(olmo)
        close(olmo.ours.layers[1].attn.whole_norm(jnp.asarray(qkv)), want, 1e-6)

    @pytest.mark.parametrize("parts", [2, long(4)])
    def test_cut(self, olmo, parts):
        """On four devices each of the two KV heads is there twice."""
        qkv, want = (jnp.asarray(x) for x in self.case(olmo))
        scale, times = olmo.ours.layers[1].attn.whole_norm.scale[...], parts // 2
        if times > 1:
            qkv, want = (repeat_kv_heads(x, olmo.config, times) for x in (qkv, want))
            scale = repeat_kv_heads(scale, olmo.config, times, shared=1)
        make = Make(jnp.dtype("float32"), None, None, parts, "tensor")

        def one(qkv, scale):
            made = WholeNorm(olmo.config, make)
            assert made.scale.shape == scale.shape
            made.scale = nnx.Param(scale)
            return made(qkv)

        cut = jax.vmap(one, (1, 0), 1, axis_name="tensor")
        found = cut(qkv.reshape(self.T, parts, -1), scale.reshape(parts, -1))
        close(found.reshape(want.shape), np.asarray(want), 1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "error", "match"),
    [
        ("gemma2", {"query_pre_attn_scalar": 0}, ModelLoadError, "query_pre_attn_scalar"),
        ("gemma2", {"final_logit_softcapping": -1.0}, ModelLoadError, "final_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, NotSupportedError, "bidirectional"),
        ("gemma3", {"rope_parameters": {"sliding_attention": 3}}, ModelLoadError, "must be an obj"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, ModelLoadError, "pattern"),
        ("gemma3", {"rope_parameters": None, "rope_local_base_freq": "x"}, ModelLoadError, "'x'"),
        ("granite", {"residual_multiplier": 0.0}, ModelLoadError, "residual_multiplier"),
        ("granite", {"logits_scaling": "8"}, ModelLoadError, "logits_scaling"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 2}, NotSupportedError, "layer_types"),
        ("smollm3", {"no_rope_layers": [1]}, ModelLoadError, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, ModelLoadError, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [True, False]}, ModelLoadError, "no_rope_layers"),
    ],
)  # fmt: skip
def test_bad_config(family, changes, error, match):
    with pytest.raises(error, match=match):
        registry.config_from_hf(make_config(family, **changes))


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    path = make_checkpoint(tmp_path, "gemma3", tokenizer=False)
    changed = {"hidden_size": 48, "tie_word_embeddings": True, "head_dim": 16}
    with pytest.raises(ModelLoadError) as error:
        converters.load(path, config_overrides={**changed, "architectures": ["Olmo3ForCausalLM"]})
    message = str(error.value)
    assert "unexpected:" in message and "layers.0.pre_feedforward_layernorm.weight" in message
    assert "wrongly shaped:" in message
    assert "layers.1.self_attn.q_norm.weight is [24], should be [64]" in message
