"""Everything static about a model: one frozen object, read from a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models.rope import RopeConfig

__all__ = ["ModelConfig", "RopeConfig", "token_ids"]

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a decoder-only model. Hashable, as nnx asks of static attributes."""

    architecture: str
    """Hugging Face class name, for example "LlamaForCausalLM"."""
    vocab_size: int
    """V."""
    hidden_size: int
    """D."""
    intermediate_size: int
    """F."""
    num_layers: int
    """L."""
    num_heads: int
    """N."""
    num_kv_heads: int
    """K; divides N."""
    head_dim: int
    """H; need not be D / N."""
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    """Longest context in tokens, after RoPE scaling as the checkpoint states it."""
    tie_word_embeddings: bool
    attention_bias: bool
    """q, k and v have a bias."""
    attention_out_bias: bool
    """The output projection of attention has a bias."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over the head dim of q and k, before RoPE."""
    windows: tuple[int | None, ...]
    """Per layer: attend to the last w positions, the current one included; None is all."""
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    """What the checkpoint says its weights are: one of DTYPES."""

    @property
    def window(self) -> int | None:
        """How many of the last positions any layer sees; None if there is one that sees all."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads the dict of a config.json (transformers 4 or 5 spelling).

        Raises NotSupportedError for an architecture or feature that we do not have (the message
        lists the supported architectures), ModelLoadError for a missing or impossible value.
        """
        # The registry imports the families, and they import this module.
        from jaxserve.models import registry

        architecture = registry.architecture_of(hf)
        family = registry.family(architecture)
        # A null in the file is a statement ("no window"), an absent key takes the default.
        hf = {**family.hf_defaults, **hf}
        num_layers = _size(hf, "num_hidden_layers")
        num_heads = _size(hf, "num_attention_heads")
        num_kv_heads = _size(hf, "num_key_value_heads", num_heads)
        hidden_size = _size(hf, "hidden_size")
        if num_heads % num_kv_heads:
            raise ModelLoadError(
                f"config.json: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        head_dim = _size(hf, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ModelLoadError(f"config.json: head_dim={head_dim} is odd; RoPE needs pairs")
        max_positions = _size(hf, "max_position_embeddings")
        fields: dict[str, Any] = {
            "architecture": architecture,
            "vocab_size": _size(hf, "vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": _size(hf, "intermediate_size"),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
            "rope": RopeConfig.from_hf(hf, max_positions),
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "attention_bias": False,
            "attention_out_bias": False,
            "mlp_bias": False,
            "qk_norm": False,
            "windows": (None,) * num_layers,
            "hidden_act": str(hf.get("hidden_act", "silu")),
            "bos_token_id": next(iter(token_ids(hf.get("bos_token_id"))), None),
            "eos_token_ids": token_ids(hf.get("eos_token_id")),
            "dtype": _dtype(hf),
        }
        return cls(**(fields | family.config_fields(hf)))


def _size(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelLoadError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _dtype(hf: dict[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (older); float32 where neither is given."""
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise NotSupportedError(f"config.json: dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id, list of ids or nothing, as a tuple without repetition."""
    if value is None:
        return ()
    return tuple(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else (value,)


def window_of(hf: dict[str, Any]) -> int | None:
    """`sliding_window` in tokens; None where it is null."""
    return None if hf["sliding_window"] is None else _size(hf, "sliding_window")


def layer_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
    """Qwen's per-layer windows: `layer_types` where given, else the layers from
    `max_window_layers` on; none at all unless `use_sliding_window`."""
    num_layers = _size(hf, "num_hidden_layers")
    window = window_of(hf) if hf.get("use_sliding_window") else None
    types = hf.get("layer_types")
    if types is None:
        first = hf["max_window_layers"]
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise NotSupportedError(
            f"config.json: layer_types must be {num_layers} of 'full_attention' or "
            f"'sliding_attention', got {types}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
