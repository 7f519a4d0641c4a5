"""Everything static about a model: one frozen object, and how its fields are read from a Hugging
Face config.json (see `registry.config_from_hf`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import values
from jaxserve.models.rope_config import FULL, NO_ROPE, SLIDING, RopeConfig, of_kind
from jaxserve.shown import quoted

__all__ = ["ModelConfig", "RopeConfig"]

DTYPES = ("bfloat16", "float16", "float32")
MOST_LAYERS = 1024
"""Layers are unrolled, in Python and in every program: nobody would see the end of more."""
_CONTEXT_KEYS = (
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
    "max_position_embeddings",
)
"""Names under which a config.json states its context, the first that is present counts (SGLang)."""


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
    """Added to the mean square, or to the variance, of every norm."""
    rope: RopeConfig
    """How positions become angles, in layers that see everything where kinds of layers differ."""
    layer_ropes: tuple[RopeConfig, ...]
    """The same per layer."""
    max_position_embeddings: int
    """As the checkpoint states it; what RoPE scalings are relative to."""
    context_length: int
    """Longest sequence in tokens, RoPE scaling included."""
    tie_word_embeddings: bool
    """The output projection is the embedding's table."""
    attention_bias: bool
    """q, k and v have a bias."""
    attention_out_bias: bool
    """The output projection of attention has a bias."""
    mlp_bias: bool
    """The MLP's products have one."""
    qk_norm: bool
    """RMSNorm over the head dim of q and k, before RoPE."""
    windows: tuple[int | None, ...]
    """Per layer: attend to the last w positions, the current one included; None is all."""
    query_scale: float
    """Multiplies the attention scores; usually 1 / sqrt(H)."""
    score_cap: float | None
    """c: scaled scores become c * tanh(scores / c); None leaves them."""
    embed_scale: float
    """The embedding's rows are multiplied by it; what makes logits of the same table is not."""
    residual_scale: float
    """What attention and MLP add to the stream is multiplied by it."""
    logit_scale: float
    """Multiplies the logits."""
    logit_cap: float | None
    """c: scaled logits become c * tanh(logits / c); None leaves them."""
    hidden_act: str
    """The MLP's activation: a name that `layers.activation` knows."""
    bos_token_id: int | None
    """Begins a text, where the checkpoint names one."""
    eos_token_ids: tuple[int, ...]
    """Any of them ends a sequence."""
    dtype: str
    """What the checkpoint says its weights are: one of DTYPES."""

    def kv_heads(self, parts: int) -> int:
        """KV heads of a model that is cut over `parts` devices, those that are there several times
        counted each time: every device has one at least."""
        return max(self.num_kv_heads, parts)

    def within(self, context: int) -> Self:
        """For an engine whose sequences have at most `context` tokens: see `RopeConfig.within`."""
        ropes = tuple(rope.within(context) for rope in self.layer_ropes)
        return dataclasses.replace(self, rope=self.rope.within(context), layer_ropes=ropes)

    @property
    def window(self) -> int | None:
        """How many of the last positions any layer sees; None if there is one that sees all."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None


def common_fields(
    hf: Mapping[str, Any], architecture: str, ropes_by_kind: bool = False
) -> dict[str, Any]:
    """The fields of ModelConfig from the keys that every family's config.json has. What some
    families spell or decide in their own way is here as most of them have it.

    hf: with the family's defaults for absent keys; a null is a statement ("no window").
    ropes_by_kind: see `Decoder`; the context that such a config states is the stretched one. Raises
    NotSupportedError for a feature that we do not have, ModelLoadError for a missing or impossible
    value.
    """
    vocab_size = values.size(hf, "vocab_size")
    num_layers = _num_layers(hf)
    num_heads = values.size(hf, "num_attention_heads")
    num_kv_heads = values.size(hf, "num_key_value_heads", num_heads)
    hidden_size = values.size(hf, "hidden_size")
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    head_dim = values.size(hf, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ModelLoadError(f"config.json: head_dim={head_dim} is odd; RoPE needs pairs")
    max_positions = values.size(hf, "max_position_embeddings")
    rope = RopeConfig.from_hf(of_kind(hf, FULL) if ropes_by_kind else hf, max_positions)
    if ropes_by_kind:
        rope = dataclasses.replace(rope, context_factor=1.0)
    return {
        "architecture": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": values.size(hf, "intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": values.number(hf, "rms_norm_eps", 1e-6, least=0),
        "rope": rope,
        "layer_ropes": (rope,) * num_layers,
        "max_position_embeddings": max_positions,
        "context_length": _context_length(hf, rope),
        "tie_word_embeddings": values.flag(hf, "tie_word_embeddings"),
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "windows": (None,) * num_layers,
        "query_scale": head_dim**-0.5,
        "score_cap": None,
        "embed_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
        "logit_cap": None,
        "hidden_act": values.text(hf, "hidden_act", "silu"),
        "bos_token_id": next(iter(values.token_ids(hf, "bos_token_id", vocab_size)), None),
        "eos_token_ids": values.token_ids(hf, "eos_token_id", vocab_size),
        "dtype": _dtype(hf),
    }


def _context_length(hf: Mapping[str, Any], rope: RopeConfig) -> int:
    """As SGLang derives it (srt/hf_transformers_utils, `get_context_length`): the first of
    _CONTEXT_KEYS, multiplied by the factor of a RoPE scaling that states no original context."""
    key = next(key for key in _CONTEXT_KEYS if hf.get(key) is not None)
    stated = values.size(hf, key)
    length = int(stated * rope.context_factor)
    if length > values.MOST_INT:
        raise ModelLoadError(
            f"config.json: {key}={stated} and the RoPE scaling's factor={rope.factor:g} make a "
            f"context of {length} tokens; at most {values.MOST_INT} can be numbered"
        )
    return length


def _dtype(hf: Mapping[str, Any]) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (older); float32 where neither is given."""
    key = "torch_dtype" if hf.get("dtype") is None else "dtype"
    name = values.text(hf, key, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise NotSupportedError(
            f"config.json: {key} {quoted(name)} is not one of {', '.join(DTYPES)}"
        )
    return name


def window_of(hf: Mapping[str, Any]) -> int | None:
    """`sliding_window` in tokens; None where it is null."""
    return None if hf["sliding_window"] is None else values.size(hf, "sliding_window")


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen's per-layer windows: `layer_types` where given, else the layers from
    `max_window_layers` on; none at all unless `use_sliding_window`."""
    window = window_of(hf) if values.flag(hf, "use_sliding_window") else None
    if hf.get("layer_types") is not None:
        return _typed_windows(hf, window)
    first = hf["max_window_layers"]
    if not isinstance(first, int) or isinstance(first, bool):
        raise values.bad("max_window_layers", "an integer", first)
    return tuple(window if i >= first else None for i in range(_num_layers(hf)))


def patterned_windows(hf: Mapping[str, Any], every: int) -> tuple[int | None, ...]:
    """Per-layer windows of a family in which every so many layers one sees everything:
    `layer_types` where given, else that pattern, the last layer of each round first."""
    window = window_of(hf)
    if hf.get("layer_types") is not None:
        return _typed_windows(hf, window)
    return tuple(window if (i + 1) % every else None for i in range(_num_layers(hf)))


def _typed_windows(hf: Mapping[str, Any], window: int | None) -> tuple[int | None, ...]:
    types, num_layers = values.strings(hf, "layer_types"), _num_layers(hf)
    if len(types) != num_layers or set(types) - {FULL, SLIDING}:
        raise NotSupportedError(
            f"config.json: layer_types must be {num_layers} of {FULL!r} or {SLIDING!r}, got "
            f"{len(types)}: {quoted(types)}"
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def layer_ropes(
    hf: Mapping[str, Any], full: RopeConfig, windows: tuple[int | None, ...]
) -> tuple[RopeConfig, ...]:
    """RoPE per layer where those with a window have parameters of their own, see
    `rope_config.of_kind`. full: of the others."""
    sliding = RopeConfig.from_hf(of_kind(hf, SLIDING), values.size(hf, "max_position_embeddings"))
    return tuple(full if window is None else sliding for window in windows)


def ropes_where(hf: Mapping[str, Any], rotated: Iterable[bool]) -> tuple[RopeConfig, ...]:
    """config.json's one RoPE in the layers that rotate q and k, none in the others."""
    rope = RopeConfig.from_hf(hf, values.size(hf, "max_position_embeddings"))
    return tuple(rope if turns else NO_ROPE for turns in rotated)


def cap_of(hf: Mapping[str, Any], key: str) -> float | None:
    """A soft cap: a number above 0, or None where it is null."""
    return None if hf[key] is None else values.number(hf, key, above=0)


def _num_layers(hf: Mapping[str, Any]) -> int:
    return values.size(hf, "num_hidden_layers", most=MOST_LAYERS)
