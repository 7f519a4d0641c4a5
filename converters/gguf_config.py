"""config.json from a GGUF file's metadata."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from converters.gguf_families import FAMILIES, PARTIAL, READ_HERE, norm_eps, own_fields
from converters.gguf_reader import BF16, F16, F32, GGUFFile, type_name
from converters.gguf_rope import rope_parameters
from jaxserve.errors import ModelLoadError, NotSupportedError

_CHANGES_MATHEMATICS = (
    "expert_count",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
_END_NAMES = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
    )
)
"""Of llama.cpp's llama-vocab.cpp, where a vocabulary's end-of-generation tokens are collected."""
_CONTROL = 3
"""ggml's token type."""
_PLAIN = {F32: "float32", F16: "float16", BF16: "bfloat16"}


def read_config(path: str) -> dict[str, Any]:
    """The dict that the model's config.json would hold, for `registry.config_from_hf`.

    The private key "_gguf" has the file's architecture, its name, and the number of tensors by
    ggml type. dtype: the checkpoint's 16-bit type; float32 when quantized.

    Raises ModelLoadError (missing, truncated or damaged file, missing keys) and NotSupportedError
    (an architecture or a feature that we do not have).
    """
    file = GGUFFile.open(path)
    arch = architecture(file)
    _refuse_unsupported(file, arch)
    hidden, heads = file.integer(f"{arch}.embedding_length"), head_count(file, arch)
    kv_heads = kv_head_count(file, arch)
    head_dim = _head_dim(file, arch, hidden, heads)
    class_name, model_type = FAMILIES[arch]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": _vocab_size(file, arch),
        "hidden_size": hidden,
        "intermediate_size": _uniform(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _block_count(file, arch),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        **norm_eps(file, arch),
        "max_position_embeddings": file.integer(f"{arch}.context_length"),
        "rope_parameters": rope_parameters(file, arch, head_dim, partial=arch in PARTIAL),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": _dtype(file),
        **_special_ids(file),
        "_gguf": {
            "architecture": arch,
            "name": file.string("general.name", None),
            "tensor_types": _tensor_types(file),
        },
    }
    return config | own_fields(file, arch, config)


def architecture(file: GGUFFile) -> str:
    """general.architecture. Raises NotSupportedError, listing the supported ones."""
    arch = file.string("general.architecture")
    if arch not in FAMILIES:
        raise NotSupportedError(
            f"{file.path}: GGUF architecture {arch!r} is not supported; supported: "
            f"{', '.join(FAMILIES)} (SmolLM and Mistral files say llama, OLMo 3 files olmo2)"
        )
    return arch


def head_count(file: GGUFFile, arch: str) -> int:
    """N, the number of query heads."""
    return _uniform(file, f"{arch}.attention.head_count")


def kv_head_count(file: GGUFFile, arch: str) -> int:
    """K, the number of KV heads; N where the file does not say."""
    key = f"{arch}.attention.head_count_kv"
    return _uniform(file, key) if key in file.metadata else head_count(file, arch)


def _uniform(file: GGUFFile, key: str) -> int:
    """An integer that may be written once per layer. Raises NotSupportedError if layers differ."""
    if not isinstance(file.metadata.get(key), np.ndarray):
        value = file.integer(key)
    else:
        values = {int(v) for v in file.numbers(key)}
        if len(values) != 1:
            raise NotSupportedError(
                f"{file.path}: {key} differs between layers ({sorted(values)}), which is not "
                "supported"
            )
        value = values.pop()
    if value < 1:
        raise ModelLoadError(f"{file.path}: metadata key {key} must be positive, got {value}")
    return value


def _block_count(file: GGUFFile, arch: str) -> int:
    """L. Raises ModelLoadError unless there are tensors of so many layers."""
    stated = file.integer(f"{arch}.block_count")
    layers = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if stated != layers:
        raise ModelLoadError(
            f"{file.path}: {arch}.block_count={stated}, but there are tensors of {layers} layers"
        )
    return stated


def _head_dim(file: GGUFFile, arch: str, hidden: int, heads: int) -> int:
    default = hidden // heads
    if arch not in PARTIAL:
        default = file.integer(f"{arch}.rope.dimension_count", default)
    key_dim = file.integer(f"{arch}.attention.key_length", default)
    value_dim = file.integer(f"{arch}.attention.value_length", key_dim)
    if key_dim != value_dim:
        raise NotSupportedError(
            f"{file.path}: {arch}.attention.key_length={key_dim} unlike value_length={value_dim} "
            "is not supported"
        )
    return key_dim


def _vocab_size(file: GGUFFile, arch: str) -> int:
    """V: the rows of the embedding, which what the file says elsewhere must fit."""
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path}: tensor token_embd.weight is missing")
    rows = file.tensors["token_embd.weight"].shape[0]
    stated = file.integer(f"{arch}.vocab_size", rows)
    tokens = len(file.strings("tokenizer.ggml.tokens", []))
    if stated != rows or tokens > rows:
        raise ModelLoadError(
            f"{file.path}: token_embd.weight has {rows} rows, but {arch}.vocab_size={stated} and "
            f"the tokenizer has {tokens} tokens"
        )
    return rows


def _special_ids(file: GGUFFile) -> dict[str, Any]:
    ids = {name: special_id(file, name) for name in ("bos", "eos", "padding", "eot", "eom")}
    # A chat model may end its turn with a token of its own.
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = list(dict.fromkeys(ends + _named_ends(file)))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }


def _named_ends(file: GGUFFile) -> list[int]:
    """Ids of the control tokens at whose names llama.cpp ends."""
    tokens = file.strings("tokenizer.ggml.tokens", [])
    kinds = file.numbers("tokenizer.ggml.token_type", np.zeros(0))[: len(tokens)]
    return [int(id_) for id_ in np.flatnonzero(kinds == _CONTROL) if tokens[id_] in _END_NAMES]


def special_id(file: GGUFFile, name: str) -> int | None:
    """Id of a special token: name is bos, eos, eot, eom, unknown or padding; None if unset.

    Raises ModelLoadError when it lies outside the vocabulary.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    # SentencePiece files may leave out what SentencePiece itself defaults to.
    usual = {"unknown": 0, "bos": 1, "eos": 2}
    sentencepiece = file.string("tokenizer.ggml.model", None) == "llama"
    value = file.integer(key, usual.get(name) if sentencepiece else None)
    tokens = file.strings("tokenizer.ggml.tokens", None)
    if value is not None and tokens is not None and not 0 <= value < len(tokens):
        raise ModelLoadError(f"{file.path}: {key}={value}, but there are {len(tokens)} tokens")
    return value


def _refuse_unsupported(file: GGUFFile, arch: str) -> None:
    for key in _CHANGES_MATHEMATICS:
        if key in READ_HERE.get(arch, ()):
            continue
        value = file.number(f"{arch}.{key}", 0.0)
        if value:
            raise NotSupportedError(f"{file.path}: {arch}.{key}={value:g} is not supported")
    if not file.flag(f"{arch}.attention.causal", True):
        raise NotSupportedError(f"{file.path}: {arch}.attention.causal=False is not supported")


def _dtype(file: GGUFFile) -> str:
    """Norms stay float32 in any file: the matrices tell."""
    kinds = {info.type_id for info in file.tensors.values() if len(info.shape) > 1}
    return _PLAIN.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _tensor_types(file: GGUFFile) -> dict[str, int]:
    """Number of tensors by ggml type, the commonest first."""
    counts = collections.Counter(type_name(info.type_id) for info in file.tensors.values())
    return dict(counts.most_common())
