"""config.json -> ModelConfig -> Declaration, and the modules as trainable Flax modules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import registry
from jaxserve.models.dense import DenseOps
from jaxserve.models.make import Make
from jaxserve.models.ops import AttentionSpec
from tests.checkpoints import ARCHITECTURES, FAMILIES, make_config

# What these models' config.json say (the keys that matter).
REAL = {
    "Llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2,
    },
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "sliding_window": None, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "bfloat16",
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "max_window_layers": 24,
        "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "vocab_size": 151936, "max_position_embeddings": 40960, "max_window_layers": 28,
        "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "attention_bias": False,
    },
    "Phi-3-mini-4k-instruct": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 32000,
    },
    "Phi-3-mini-128k-instruct": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [7.5] * 48},
        "bos_token_id": 1, "eos_token_id": 32000,
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": 200064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
        "bos_token_id": 199999, "eos_token_id": 199999,
    },
    "GLM-4-9B-0414": {
        "model_type": "glm4", "hidden_size": 4096, "intermediate_size": 13696, "head_dim": 128,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2,
        "vocab_size": 151552, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "attention_bias": True,
        "torch_dtype": "bfloat16", "eos_token_id": [151329, 151336, 151338],
    },
    "glm-4-9b-chat-hf": {
        "model_type": "glm", "hidden_size": 4096, "intermediate_size": 13696,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2,
        "vocab_size": 151552, "rms_norm_eps": 1.5625e-7, "rope_theta": 10000.0,
    },
    "c4ai-command-r7b-12-2024": {
        "model_type": "cohere2", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 256000, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
        "logit_scale": 0.25, "sliding_window": 4096, "sliding_window_pattern": 4,
        "rope_theta": 50000, "head_dim": 128, "bos_token_id": 5, "eos_token_id": 255001,
    },
    "upper layers with a window": {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 64, "max_window_layers": 3, "sliding_window": 7, "use_sliding_window": True,
    },
    "only what is needed": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_agrees_with_transformers(name):
    pytest.importorskip("torch")
    from transformers import AutoConfig

    hf = REAL[name]
    theirs = AutoConfig.for_model(**hf)
    ours = registry.config_from_hf(hf)
    assert ours.architecture == ARCHITECTURES[hf["model_type"]]
    assert (ours.vocab_size, ours.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert ours.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    eps = "layer_norm_eps" if hf["model_type"] == "cohere2" else "rms_norm_eps"
    assert ours.rms_norm_eps == getattr(theirs, eps)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.type == theirs.rope_parameters["rope_type"]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.partial == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (
        eos if isinstance(eos, list) else [] if eos is None else [eos]
    )
    layer_types = getattr(theirs, "layer_types", None)
    if layer_types is None:
        layer_types = ["sliding_attention"] * ours.num_layers
    window = getattr(theirs, "sliding_window", None)
    assert list(ours.windows) == [
        window if kind == "sliding_attention" else None for kind in layer_types
    ]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, NotSupportedError,
         "GPT2LMHeadModel.*Cohere2For.*, LlamaForCausalLM, .*SmolLM3ForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, NotSupportedError, "model_type='bert'"),
        ({"hidden_size": None}, ModelLoadError, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": "two"}, ModelLoadError, "num_hidden_layers .* got 'two'"),
        ({"num_key_value_heads": 3}, ModelLoadError, "num_key_value_heads=3"),
        ({"head_dim": 15}, ModelLoadError, "head_dim=15 is odd"),
        ({"partial_rotary_factor": 0.5}, NotSupportedError,
         r"partial_rotary_factor=0\.5 is not supported for LlamaForCausalLM"),
        ({"dtype": "int8"}, NotSupportedError, "'int8' is not one of bfloat16"),
    ],
)  # fmt: skip
def test_bad_config(changes, error, match):
    with pytest.raises(error, match=match):
        registry.config_from_hf(make_config("llama", **changes))


def test_bad_layer_types_and_window():
    with pytest.raises(NotSupportedError, match=r"layer_types must be 2 of"):
        registry.config_from_hf(make_config("qwen2", layer_types=["full_attention", "chunked"]))
    with pytest.raises(ModelLoadError, match=r"sliding_window must be a positive integer, got 0"):
        registry.config_from_hf(make_config("mistral", sliding_window=0))


def test_unknown_activation_fails_at_declaration():
    config = registry.config_from_hf(make_config("llama", hidden_act="mish"))
    with pytest.raises(NotSupportedError, match=r"hidden_act='mish'"):
        registry.declare(config, "float32")


def test_old_dtype_key():
    hf = make_config("llama", torch_dtype="bfloat16")
    del hf["dtype"]
    assert registry.config_from_hf(hf).dtype == "bfloat16"


def test_config_is_hashable_and_families_are_listed():
    assert len({registry.config_from_hf(make_config(name)) for name in FAMILIES}) == len(FAMILIES)
    listed = registry.supported_architectures()
    of_text = [name for name in listed if name.endswith("ForCausalLM")]
    assert of_text == list(ARCHITECTURES.values())
    with pytest.raises(NotSupportedError, match=r"'Nope'.*supported architectures: Cohere2"):
        registry.family("Nope")


_COMMON = (
    "attn.o.kernel", "attn.qkv.kernel", "input_norm.scale", "mlp.down.kernel", "mlp.gate_up.kernel",
    "post_norm.scale",
)  # fmt: skip
_GEMMA_MLP = ("mlp.down.kernel", "mlp.gate_up.kernel", "mlp.out_norm.scale", "post_norm.scale")
_OLMO = (
    "attn.o.kernel", "attn.out_norm.scale", "attn.qkv.kernel", "attn.whole_norm.scale",
    "mlp.down.kernel", "mlp.gate_up.kernel", "mlp.out_norm.scale",
)  # fmt: skip
PATHS = {
    "cohere2": tuple(path for path in _COMMON if path != "post_norm.scale"),
    "glm4": (
        "attn.o.kernel", "attn.out_norm.scale", "attn.qkv.bias", "attn.qkv.kernel",
        "input_norm.scale", "mlp.down.kernel", "mlp.gate_up.kernel", "mlp.out_norm.scale",
        "post_norm.scale",
    ),
    "glm": (*_COMMON[:1], "attn.qkv.bias", *_COMMON[1:]),
    "llama": _COMMON,
    "mistral": _COMMON,
    "phi3": _COMMON,
    "qwen2": (*_COMMON[:1], "attn.qkv.bias", *_COMMON[1:]),
    "qwen3": (
        "attn.k_norm.scale", "attn.o.kernel", "attn.q_norm.scale", "attn.qkv.kernel",
        *_COMMON[2:],
    ),
    "gemma2": (
        "attn.o.kernel", "attn.out_norm.scale", "attn.qkv.kernel", "input_norm.scale",
        *_GEMMA_MLP,
    ),
    "gemma3": (
        "attn.k_norm.scale", "attn.o.kernel", "attn.out_norm.scale", "attn.q_norm.scale",
        "attn.qkv.kernel", "input_norm.scale", *_GEMMA_MLP,
    ),
    "granite": _COMMON,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "smollm3": _COMMON,
}  # fmt: skip
"""Parameters of a layer in the order of the engine's flat tuple."""


class TestDeclaration:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("quantization", [None, "fp8"])
    def test_paths_and_their_order(self, family, quantization):
        """Stored Orbax folders, conversion tables and the engine's programs depend on them."""
        config = registry.config_from_hf(make_config(family, num_hidden_layers=11))
        paths: list[str] = []
        for path in PATHS[family]:
            quantized = quantization is not None and path.endswith(".kernel")
            paths += [path, f"{path}_scale"] if quantized else [path]
        assert list(registry.declare(config, "bfloat16", quantization).specs) == [
            "embed.embedding",
            "final_norm.scale",
            *(f"layers.{i}.{path}" for i in range(11) for path in paths),
            "lm_head.embedding",
        ]

    def test_specs(self):
        hf = make_config("llama", head_dim=24, attention_bias=True, mlp_bias=True)
        config = registry.config_from_hf(hf | {"num_hidden_layers": 1})
        specs = registry.declare(config, "bfloat16").specs
        assert {path: spec.shape for path, spec in specs.items()} == {
            "embed.embedding": (512, 64),
            "layers.0.input_norm.scale": (64,),
            "layers.0.attn.qkv.kernel": (64, 8 * 24),
            "layers.0.attn.qkv.bias": (8 * 24,),
            "layers.0.attn.o.kernel": (4 * 24, 64),
            "layers.0.attn.o.bias": (64,),
            "layers.0.post_norm.scale": (64,),
            "layers.0.mlp.gate_up.kernel": (64, 2, 128),
            "layers.0.mlp.gate_up.bias": (2, 128),
            "layers.0.mlp.down.kernel": (128, 64),
            "layers.0.mlp.down.bias": (64,),
            "final_norm.scale": (64,),
            "lm_head.embedding": (512, 64),
        }
        assert {spec.dtype for spec in specs.values()} == {jnp.dtype("bfloat16")}

    def test_q_and_k_norms_and_tied_head(self):
        config = registry.config_from_hf(make_config("qwen3", tie_word_embeddings=True))
        specs = registry.declare(config, "float32").specs
        assert specs["layers.1.attn.q_norm.scale"].shape == (32,)
        assert "lm_head.embedding" not in specs

    def test_allocates_nothing_for_a_large_model(self):
        hf = REAL["Llama-3.1-8B-Instruct"]
        declaration = registry.declare(registry.config_from_hf(hf), "bfloat16")
        assert all(isinstance(s, jax.ShapeDtypeStruct) for s in declaration.specs.values())
        size = sum(int(np.prod(s.shape)) for s in declaration.specs.values())
        assert size == 8_030_261_248

    def test_bind_checks_paths(self):
        declaration = registry.declare(registry.config_from_hf(make_config("llama")), "float32")
        params = dict(declaration.specs)
        params["extra"] = params.pop("final_norm.scale")
        with pytest.raises(ModelLoadError, match=r"missing \['final_norm.scale'\].*\['extra'\]"):
            declaration.bind(params)

    def test_bind_inside_jit_puts_each_array_in_its_place(self):
        declaration = registry.declare(registry.config_from_hf(make_config("qwen3")), "float32")
        values = {path: jnp.full(s.shape, i) for i, (path, s) in enumerate(
            declaration.specs.items()
        )}  # fmt: skip

        @jax.jit
        def read(*arrays):
            model = declaration.bind(dict(zip(declaration.specs, arrays, strict=True)))
            leaves = dict(nnx.to_flat_state(nnx.state(model)))
            norm, head = ("layers", 1, "attn", "k_norm", "scale"), ("lm_head", "embedding")
            return leaves[norm][...][0], leaves[head][...][0, 0]

        order = list(declaration.specs)
        assert [int(x) for x in read(*values.values())] == [
            order.index("layers.1.attn.k_norm.scale"), order.index("lm_head.embedding"),
        ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_same_module_trains(family):
    """Gradients reach every parameter, and the optimizer's steps lower the loss."""
    config = registry.config_from_hf(make_config(family, num_hidden_layers=1))
    make = Make(jnp.dtype("float32"), nnx.Rngs(0))
    model = registry.family(config.architecture)(config, make)
    ids = jnp.arange(24, dtype=jnp.int32) * 7 % 512

    def loss_of(model):
        hidden, _ = model(ids[:-1], jnp.arange(23), None, None, DenseOps())
        logits = model.logits(hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:]).mean()

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss, grads

    first, grads = train_step(model, optimizer)
    flat = nnx.to_flat_state(nnx.state(grads))
    assert {".".join(map(str, key)) for key, _ in flat} == set(
        registry.declare(config, "float32").specs
    )
    assert all(float(jnp.abs(leaf[...]).max()) > 0 for _, leaf in flat)
    for _ in range(5):
        last, _ = train_step(model, optimizer)
    assert float(last) < float(first) - 1


def test_dense_attention_keeps_packed_sequences_apart():
    rng = np.random.default_rng(0)
    spec = AttentionSpec(0, num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, window=3, eps=0.0)
    qkv, cos, sin = (jnp.asarray(rng.standard_normal((10, n), np.float32)) for n in (64, 4, 4))
    segments = jnp.asarray([0] * 6 + [1] * 4)
    packed, cache = DenseOps().attend(qkv, cos, sin, "cache", segments, spec)
    assert cache == "cache"
    for part in (slice(0, 6), slice(6, 10)):
        alone, _ = DenseOps().attend(qkv[part], cos[part], sin[part], None, None, spec)
        np.testing.assert_allclose(packed[part], alone, atol=1e-6)
