"""What a GGUF file says of the families that llama.cpp gives an architecture of their own, and what
it leaves for llama.cpp to know (src/models and conversion of https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from converters.gguf_reader import GGUFFile
from jaxserve.errors import NotSupportedError
from jaxserve.models.rope_config import FULL, SLIDING

FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # general.architecture: Hugging Face class, model_type
        "llama": ("LlamaForCausalLM", "llama"),
        "cohere2": ("Cohere2ForCausalLM", "cohere2"),
        "gemma2": ("Gemma2ForCausalLM", "gemma2"),
        "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
        "glm4": ("Glm4ForCausalLM", "glm4"),
        "granite": ("GraniteForCausalLM", "granite"),
        "olmo2": ("Olmo2ForCausalLM", "olmo2"),
        "phi3": ("Phi3ForCausalLM", "phi3"),
        "qwen2": ("Qwen2ForCausalLM", "qwen2"),
        "qwen3": ("Qwen3ForCausalLM", "qwen3"),
        "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    }
)
PERMUTED = ("llama", "granite", "smollm3")
"""Architectures whose q and k rows llama.cpp's converter reorders."""
ONE_PLUS = ("gemma2", "gemma3")
"""Whose norms hold 1 more than Hugging Face's."""
PARTIAL = ("glm4", "phi3")
"""Whose heads may be rotated in part."""
READ_HERE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cohere2": ("logit_scale",),
        "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
        "gemma3": ("final_logit_softcapping",),
        "granite": ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
    }
)
"""Keys that change the mathematics, and are understood for these architectures."""
_TYPED = ("qwen2", "qwen3", "smollm3")
"""Whose layers may each have a window or not, as the file says."""
_PATTERN = ".attention.sliding_window_pattern"
_LOCAL_THETA = 10_000.0
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose score scale is that of D / N instead of H; no key says so."""


def norm_eps(file: GGUFFile, arch: str) -> dict[str, float]:
    """Of all norms, which are LayerNorms in some families."""
    if arch == "cohere2":
        return {"layer_norm_eps": file.number(f"{arch}.attention.layer_norm_epsilon")}
    return {"rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon")}


def own_fields(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json that the family has beside the common ones, or that it spells otherwise.

    config: the common ones. Raises NotSupportedError where the file does not tell which layers have
    a window.
    """
    return _OWN.get(arch, _windows)(file, arch, config)


def _windows(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding windows. A llama file with one is a Mistral: it has one in every layer, as Phi-3."""
    window = _window(file, arch)
    if window is None:
        return {}
    kinds = _kinds(file, arch, config)
    if arch in _TYPED and kinds is not None:
        return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    if arch not in ("llama", "phi3") or kinds is not None:
        raise _unclear(file, arch)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return {"sliding_window": window} | (mistral if arch == "llama" else {})


def _unclear(file: GGUFFile, arch: str) -> NotSupportedError:
    return NotSupportedError(
        f"{file.path}: {arch}.attention.sliding_window={_window(file, arch)} with "
        f"sliding_window_pattern={file.metadata.get(arch + _PATTERN)!r} is not supported: it does "
        "not tell which layers have the window"
    )


def _cohere2(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    scale = {"logit_scale": file.number(f"{arch}.logit_scale")}
    return scale | _patterned(file, arch, config, 4, None)


def _gemma(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    largest = layers == _LARGEST[arch]
    scalar = config["hidden_size"] // heads if largest else config["head_dim"]
    second = arch == "gemma2"
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    read = {key: file.number(f"{arch}.{key}", caps[key] if second else 0.0) for key in caps}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        **{key: cap or None for key, cap in read.items()},
        **_patterned(file, arch, config, 2 if second else 6, 4096 if second else None),
        **({} if second else _ropes(file, arch, config, _LOCAL_THETA)),
    }


def _olmo2(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """One with a window is OLMo 3."""
    if _window(file, arch) is None:
        return {}
    family = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
    theta = config["rope_parameters"]["rope_theta"]
    return family | _patterned(file, arch, config, 4, None) | _ropes(file, arch, config, theta)


def _granite(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp takes 0 for unset."""
    given = {key: file.number(f"{arch}.{key}", 0.0) for key in READ_HERE[arch]}
    return {
        "attention_multiplier": given["attention.scale"] or config["head_dim"] ** -0.5,
        "embedding_multiplier": given["embedding_scale"] or 1.0,
        "residual_multiplier": given["residual_scale"] or 1.0,
        "logits_scaling": given["logit_scale"] or 1.0,
        **_windows(file, arch, config),
    }


def _smollm3(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp has the interval in its source."""
    return _windows(file, arch, config) | {"no_rope_layer_interval": 4}


_OWN: Mapping[str, Callable[[GGUFFile, str, Mapping[str, Any]], dict[str, Any]]] = MappingProxyType(
    {
        "cohere2": _cohere2,
        "gemma2": _gemma,
        "gemma3": _gemma,
        "granite": _granite,
        "olmo2": _olmo2,
        "smollm3": _smollm3,
    }
)


def _window(file: GGUFFile, arch: str) -> int | None:
    return file.integer(f"{arch}.attention.sliding_window", 0) or None


def _kinds(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> list[str] | None:
    """`layer_types` of a pattern, which has a flag for each layer; None where there is none."""
    pattern = file.metadata.get(arch + _PATTERN)
    if pattern is None:
        return None
    if not isinstance(pattern, np.ndarray) or pattern.shape != (config["num_hidden_layers"],):
        raise _unclear(file, arch)
    return [SLIDING if slides else FULL for slides in pattern]


def _patterned(
    file: GGUFFile, arch: str, config: Mapping[str, Any], every: int, usual: int | None
) -> dict[str, Any]:
    """Windows in all layers but one of so many, where the file states no pattern."""
    usual_kinds = [SLIDING if (i + 1) % every else FULL for i in range(config["num_hidden_layers"])]
    return {
        "sliding_window": _window(file, arch) or usual,
        "layer_types": _kinds(file, arch, config) or usual_kinds,
    }


def _ropes(file: GGUFFile, arch: str, config: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """RoPE by kind of layer: what the file states of it is of those without a window."""
    theta = file.number(f"{arch}.rope.freq_base_swa", usual)
    local = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {FULL: config["rope_parameters"], SLIDING: local}}
