"""Llama-like families against Hugging Face's torch modules in float32: each part, then the whole.
The others are in test_models_families.py."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest

import converters
from jaxserve.models import rope
from jaxserve.models.dense import DenseOps, split_heads
from jaxserve.models.ops import Residual
from tests.checkpoints import LLAMA_LIKE, VOCAB, make_checkpoint

torch = pytest.importorskip("torch")
T = 40
TOLERANCE = 2e-5
OPS = DenseOps()


def hf_model(path: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def load_pair(path: str) -> types.SimpleNamespace:
    loaded = converters.load(path, dtype="float32")
    model = loaded.declaration.bind(loaded.params)
    return types.SimpleNamespace(ours=model, hf=hf_model(path), config=loaded.config)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_ids(count: int = T, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.int32)


def our_logits(model, ids: np.ndarray) -> np.ndarray:
    positions = jnp.arange(len(ids), dtype=jnp.int32)
    hidden, _ = model(jnp.asarray(ids), positions, None, None, OPS)
    return np.asarray(model.logits(hidden))


@torch.no_grad()
def hf_logits(model, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids).long()[None]).logits[0].numpy()


@torch.no_grad()
def call(module, x: np.ndarray) -> np.ndarray:
    return module(torch.from_numpy(x)).numpy()


def close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=LLAMA_LIKE)
def pair(request, tmp_path_factory):
    """A family whose modules are named and shaped as Llama's, with every optional part it has:
    biases, windows, head_dim unlike D / N."""
    extras = {
        "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        "mistral": {"head_dim": 24},
        "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "qwen3": {"attention_bias": True},
    }[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return load_pair(make_checkpoint(folder, request.param, **extras))


class TestParts:
    def test_embedding(self, pair):
        ids = random_ids()
        theirs = call(pair.hf.model.embed_tokens, ids.astype(np.int64))
        close(pair.ours.embed(jnp.asarray(ids)), theirs, 0)

    def test_norms(self, pair):
        x = random(T, 64)
        theirs = pair.hf.model
        close(pair.ours.layers[0].input_norm(x), call(theirs.layers[0].input_layernorm, x))
        close(pair.ours.layers[1].post_norm(x), call(theirs.layers[1].post_attention_layernorm, x))
        close(pair.ours.final_norm(x), call(theirs.norm, x))

    def test_q_k_v(self, pair):
        x = random(T, 64)
        attn = pair.ours.layers[1].attn
        unturned = (
            jnp.ones((T, pair.config.head_dim // 2)),
            jnp.zeros((T, pair.config.head_dim // 2)),
        )
        norms = (n and n.scale[...] for n in (attn.q_norm, attn.k_norm))
        qkv, stream = attn.qkv.read(Residual(jnp.asarray(x)), OPS, pair.ours.layers[1].input_norm)
        close(stream.x, x, 0)
        q, k, v = split_heads(qkv, *unturned, attn.spec, *norms)
        hf = pair.hf.model.layers[1].self_attn
        normed = call(pair.hf.model.layers[1].input_layernorm, x)
        heads = {
            name: call(projection, normed).reshape(T, -1, pair.config.head_dim)
            for name, projection in (("q", hf.q_proj), ("k", hf.k_proj), ("v", hf.v_proj))
        }
        if pair.config.qk_norm:
            heads["q"], heads["k"] = call(hf.q_norm, heads["q"]), call(hf.k_norm, heads["k"])
        for ours, theirs in ((q, heads["q"]), (k, heads["k"]), (v, heads["v"])):
            close(ours, theirs)

    def test_rotation(self, pair):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        config = pair.config
        q, k = random(T, config.num_heads, config.head_dim), random(T, 1, config.head_dim, seed=1)
        positions = np.arange(3, 3 + T)
        cos, sin = rope.cos_sin(config.rope, config.head_dim, jnp.asarray(positions))
        with torch.no_grad():
            tables = pair.hf.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions)[None])
            hf_q, hf_k = apply_rotary_pos_emb(
                torch.from_numpy(q)[None], torch.from_numpy(k)[None], *tables, unsqueeze_dim=2
            )
        close(rope.rotate(jnp.asarray(q), cos, sin), hf_q[0].numpy())
        close(rope.rotate(jnp.asarray(k), cos, sin), hf_k[0].numpy())

    def test_output_projection(self, pair):
        x = random(T, pair.config.num_heads * pair.config.head_dim)
        theirs = call(pair.hf.model.layers[0].self_attn.o_proj, x)
        stream = pair.ours.layers[0].attn.o.write(jnp.asarray(x), OPS, Residual(jnp.ones((T, 64))))
        close(stream.x, theirs + 1)

    def test_mlp(self, pair):
        x = random(T, 64)
        ours, theirs = pair.ours.layers[0], pair.hf.model.layers[0]
        stream = ours.mlp(Residual(jnp.asarray(x)), OPS, ours.post_norm)
        close(stream.x, x + call(theirs.mlp, call(theirs.post_attention_layernorm, x)))

    @pytest.mark.parametrize("index", [0, 1])
    def test_layer(self, pair, index):
        x = random(T, 64)
        config = pair.config
        positions = np.arange(T)
        cos, sin = rope.cos_sin(config.rope, config.head_dim, jnp.asarray(positions))
        layer = pair.ours.layers[index]
        ours, cache = layer(Residual(jnp.asarray(x)), cos, sin, "passed on", None, OPS)
        distance = positions[:, None] - positions
        hidden = (distance < 0) | (distance >= (config.windows[index] or T))
        mask = torch.from_numpy(np.where(hidden, -1e30, 0).astype(np.float32))[None, None]
        with torch.no_grad():
            tables = pair.hf.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions)[None])
            theirs = pair.hf.model.layers[index](
                torch.from_numpy(x)[None], attention_mask=mask, position_embeddings=tables
            )
        close(ours.x, theirs[0].numpy())
        assert cache == "passed on"

    def test_logits(self, pair):
        x = random(3, 64)
        ours = pair.ours.logits(jnp.asarray(x))
        assert ours.dtype == jnp.float32
        close(ours, call(pair.hf.lm_head, x))

    def test_whole(self, pair):
        ids = random_ids()
        close(our_logits(pair.ours, ids), hf_logits(pair.hf, ids), 1e-4)


def scaled(kind: str, **parameters) -> dict:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "tied qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "no grouping": ("llama", {"num_key_value_heads": 4}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "big theta": ("llama", {"rope_parameters": scaled("default") | {"rope_theta": 5e5}}),
    "linear": ("llama", {"rope_parameters": scaled("linear", factor=4.0)}),
    "dynamic": ("llama", {"rope_parameters": scaled("dynamic", factor=2.0)}),
    "llama3": ("llama", {"rope_parameters": scaled("llama3", **LLAMA3)}),
    "yarn": (
        "qwen3",
        {"rope_parameters": scaled("yarn", factor=4.0, original_max_position_embeddings=256)},
    ),
    "transformers 4 spelling": (
        "llama",
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ),
    "transformers 4 llama3": (
        "llama",
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": scaled("llama3", **LLAMA3)},
    ),
    "window of one": ("mistral", {"sliding_window": 1}),
    "no window": ("mistral", {"sliding_window": None}),
    "window unused": ("qwen2", {"sliding_window": 8}),
    "layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "three layers": ("qwen2", {"num_hidden_layers": 3}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    family, overrides = VARIANTS[name]
    pair = load_pair(make_checkpoint(tmp_path, family, tokenizer=False, **overrides))
    ids = random_ids(seed=7)
    close(our_logits(pair.ours, ids), hf_logits(pair.hf, ids), 1e-4)


@pytest.mark.long
def test_dynamic_rope_beyond_the_original_context(tmp_path):
    """As Hugging Face generates: the prompt fits, then one token at a time with a KV cache."""
    path = make_checkpoint(
        tmp_path,
        "llama",
        tokenizer=False,
        max_position_embeddings=24,
        rope_parameters=scaled("dynamic", factor=2.0),
    )
    pair = load_pair(path)
    ids = random_ids(48, seed=3)
    rows, past = [], None
    with torch.no_grad():
        for start, stop in [(0, 20), *((i, i + 1) for i in range(20, 48))]:
            out = pair.hf(torch.from_numpy(ids[None, start:stop]).long(), past_key_values=past)
            past = out.past_key_values
            rows.append(out.logits[0].numpy())
    close(our_logits(pair.ours, ids), np.concatenate(rows), 1e-4)


def test_bfloat16_checkpoint_in_float32(tmp_path):
    pair = load_pair(make_checkpoint(tmp_path, "qwen2", dtype="bfloat16", tokenizer=False))
    assert pair.config.dtype == "bfloat16"
    ids = random_ids()
    close(our_logits(pair.ours, ids), hf_logits(pair.hf, ids), 1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_bfloat16_activations_stay_near_float32(tmp_path, family):
    """Norms, RoPE and logits are float32 inside: not further off than Hugging Face's bfloat16."""
    path = make_checkpoint(tmp_path, family, dtype="bfloat16", tokenizer=False)
    loaded = converters.load(path, dtype="bfloat16")
    ids = random_ids()
    half = our_logits(loaded.declaration.bind(loaded.params), ids)
    exact = hf_logits(hf_model(path), ids)
    with torch.no_grad():
        model = hf_model(path).to(torch.bfloat16)
        theirs = model(torch.from_numpy(ids).long()[None]).logits[0].float().numpy()
    assert np.abs(half - exact).mean() <= 1.2 * np.abs(theirs - exact).mean()
