"""Tiny random Hugging Face checkpoint folders, so that no test downloads anything.

    path = make_checkpoint(tmp_path / "m", family="qwen3", tie_word_embeddings=True)

Written without torch and without our own converters: they are what the tests check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ARCHITECTURES = {
    "cohere2": "Cohere2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm": "GlmForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Families that have Llama's parts and names, and whose cases `make test` runs."""
SOME = (*LLAMA_LIKE, "cohere2", "gemma3", "olmo2")
"""Of all kinds of parts that there are: for what depends on nothing else of a family."""
ONE_PLUS = ("gemma2", "gemma3")
"""Families whose norms hold what their weights differ from 1 by."""

VOCAB = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A quick brown fox jumps over the lazy dog while the sun goes down.",
    "Once upon a time there was a small village between two great rivers.",
    "She sells sea shells on the sea shore; the shells she sells are surely sea shells.",
    "What is the answer to the question? The answer is forty-two (42).",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    'It was the best of times, it was the worst of times," he said.',
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000 3.14159 2.71828",
    "Water boils at one hundred degrees and freezes at zero degrees.",
    "Für Elise, garçon, naïve, Ünïcödé, 日本語, emoji 🙂 and more.",
    "user system assistant hello world you are a helpful assistant",
    "The children were playing in the garden when the rain began to fall.",
)


NORMS = ("input_layernorm", "post_attention_layernorm")
BEHIND_MLP = "post_feedforward_layernorm"
OTHER_NORMS = {
    "cohere2": NORMS[:1],
    "gemma2": (*NORMS, "pre_feedforward_layernorm", BEHIND_MLP),
    "gemma3": (*NORMS, "pre_feedforward_layernorm", BEHIND_MLP),
    "glm4": (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo2": (NORMS[1], BEHIND_MLP),
    "olmo3": (NORMS[1], BEHIND_MLP),
}
"""Of a layer's stream, in families where they are not `NORMS`."""


def make_checkpoint(
    folder: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: str = "float32",
    tokenizer: bool = True,
    **overrides: Any,
) -> str:
    """Writes config.json, generation_config.json, weights and tokenizer into `folder`.

    family: a key of ARCHITECTURES. seed: of the weights. shards: number of safetensors files
    (more than one also writes the index). dtype: of the weights, as named in config.json.
    tokenizer: False leaves its files out. overrides: keys of config.json, for example
    num_hidden_layers=1 or rope_parameters={...}. Returns the folder as a string.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, dtype=dtype, **overrides)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": IM_START,
            "eos_token_id": [IM_END, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
            "transformers_version": "5.0.0",
        },
    )
    write_weights(folder, make_weights(config, seed=seed, dtype=dtype), shards=shards)
    if tokenizer:
        write_tokenizer(folder)
    return str(folder)


def make_config(family: str = "llama", *, dtype: str = "float32", **overrides: Any) -> dict:
    """A config.json as transformers 5 writes it, with `overrides` on top."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": {"gemma3": "gemma3_text"}.get(family, family),
        "dtype": dtype,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "layer_norm_eps" if family == "cohere2" else "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
        "transformers_version": "5.0.0",
    }
    config |= {
        "cohere2": {"logit_scale": 0.25, "sliding_window": 8, "sliding_window_pattern": 2},
        "glm4": {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5},
        "glm": {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5},
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": 16},
        "phi3": {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 64,
                # alike: Hugging Face decides between them by the sequence's length
                "short_factor": [1.0, 2.0, 4.5, 9.0],
                "long_factor": [1.0, 2.0, 4.5, 9.0],
            },
        },
        "qwen2": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 1},
        "qwen3": {"head_dim": 32, "attention_bias": False, "use_sliding_window": False},
        "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "gemma3": GEMMA | {"rope_parameters": BY_KIND},
        "granite": GRANITE,
        "olmo2": {"attention_bias": False},
        "olmo3": {"attention_bias": False, "sliding_window": 16, "rope_parameters": BY_KIND},
        "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": False},
    }[family]
    config |= overrides
    if family in ("gemma2", "gemma3", "olmo3"):
        kinds = ("sliding_attention", "full_attention")
        config.setdefault("layer_types", [kinds[i % 2] for i in range(config["num_hidden_layers"])])
    return config


GEMMA = {
    "head_dim": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "sliding_window": 16,
    "attention_bias": False,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.5,
    "attention_bias": False,
    "mlp_bias": False,
}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
"""RoPE parameters by kind of layer."""


def by_kv_head(q: np.ndarray, k: np.ndarray, v: np.ndarray, kv_heads: int) -> np.ndarray:
    """Projections [in, out], or biases [out], as the engine fuses them: for each KV head its
    queries, its keys and its values."""
    parts = [np.split(x, kv_heads, axis=-1) for x in (q, k, v)]
    return np.concatenate([part[i] for i in range(kv_heads) for part in parts], axis=-1)


def make_weights(config: dict, *, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names. Layers outweigh embeddings in the residual
    stream, so that a tied model does not just repeat its last token."""
    rng = np.random.default_rng(seed)
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    family = config["model_type"].removesuffix("_text")
    dim, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or dim // heads
    tensors: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, std: float) -> None:
        tensors[name] = (std * rng.standard_normal(shape, np.float32)).astype(target)

    def linear(name: str, size_out: int, size_in: int, bias: bool) -> None:
        normal(f"{name}.weight", size_out, size_in, std=1.5 / size_in**0.5)
        if bias:
            normal(f"{name}.bias", size_out, std=0.2)

    def norm(name: str, size: int) -> None:
        middle = 0 if family in ONE_PLUS else 1
        tensors[name] = (middle + 0.2 * rng.standard_normal(size, np.float32)).astype(target)

    normal("model.embed_tokens.weight", vocab, dim, std=0.2)
    attention_bias = bool(config.get("attention_bias"))
    out_bias = attention_bias and family not in ("glm", "glm4", "mistral", "phi3", "qwen2")
    qkv_bias = out_bias or family == "qwen2" or (attention_bias and family in ("glm", "glm4"))
    mlp_bias = bool(config.get("mlp_bias")) and family in ("llama", "granite", "smollm3")
    qkv = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    if family == "phi3":
        qkv = {"qkv_proj": heads + 2 * kv_heads}
    gate_up = {"gate_proj": mlp, "up_proj": mlp}
    if family in ("glm", "glm4", "phi3"):
        gate_up = {"gate_up_proj": 2 * mlp}
    whole = family in ("olmo2", "olmo3")  # norms of q and k over all heads
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, count in qkv.items():
            linear(f"{layer}.self_attn.{name}", count * head_dim, dim, qkv_bias)
        linear(f"{layer}.self_attn.o_proj", dim, heads * head_dim, out_bias)
        if whole or family in ("qwen3", "gemma3"):
            norm(f"{layer}.self_attn.q_norm.weight", head_dim * (heads if whole else 1))
            norm(f"{layer}.self_attn.k_norm.weight", head_dim * (kv_heads if whole else 1))
        for name, size in gate_up.items():
            linear(f"{layer}.mlp.{name}", size, dim, mlp_bias)
        linear(f"{layer}.mlp.down_proj", dim, mlp, mlp_bias)
        for name in OTHER_NORMS.get(family, NORMS):
            norm(f"{layer}.{name}.weight", dim)
    norm("model.norm.weight", dim)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", vocab, dim, std=0.2)
    return tensors


def separate(config: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`make_weights` with what a family fuses taken apart, and rows of q and k in our order: RoPE's
    pairs are rows (i, H/2 + i) of a head."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    found = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            cuts = np.cumsum([heads, kv_heads]) * head_dim
            for part, value in zip("qkv", np.split(tensor, cuts), strict=True):
                found[name.replace("qkv", part)] = value
        elif "gate_up_proj" in name:
            for part, value in zip(("gate", "up"), np.split(tensor, 2), strict=True):
                found[name.replace("gate_up", part)] = value
        else:
            found[name] = tensor
    for name in found:
        if "q_proj" in name or "k_proj" in name:
            each = found[name].reshape(-1, head_dim, *found[name].shape[1:])
            found[name] = each[:, _order(config, head_dim)].reshape(found[name].shape)
    return found


def _order(config: dict, head_dim: int) -> list[int]:
    partial = config["rope_parameters"].get("partial_rotary_factor")
    rotated = int((partial or config.get("partial_rotary_factor", 1.0)) * head_dim)
    pairs = [(i, rotated // 2 + i) for i in range(rotated // 2)]
    if config["model_type"] in ("cohere2", "glm", "glm4"):
        pairs = [(i, i + 1) for i in range(0, rotated, 2)]
    rest, half = list(range(rotated, head_dim)), (head_dim - rotated) // 2
    pairs += zip(rest[:half], rest[half:], strict=True)
    return [a for a, _ in pairs] + [b for _, b in pairs]


def write_weights(folder: str | Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """model.safetensors, or `shards` numbered files with their index."""
    folder = Path(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: str | Path) -> None:
    """A byte-level BPE tokenizer of VOCAB entries with a ChatML chat template."""
    folder = Path(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[IM_START],
            "eos_token": SPECIAL_TOKENS[IM_END],
            "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
