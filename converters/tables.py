"""One table per family: which Hugging Face tensors make up each parameter, and how.

A rule's `path` is one of ours (see `registry.declare(...).specs`), its `sources` are Hugging Face
names; `{i}` is the layer number in both. Rules whose path a model does not declare are unused, so
optional parts (biases, an untied head) need no table of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from jaxserve.errors import NotSupportedError
from jaxserve.models.config import ModelConfig

_LAYER = "model.layers.{i}."


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one parameter, or one of each layer, comes from."""

    path: str
    """Ours, dotted; `{i}` is the layer."""
    sources: tuple[str, ...]
    """Hugging Face's names, side by side."""
    transpose: bool = False
    """Each is [out, in] there and [in, out] here."""
    widths: Callable[[ModelConfig], tuple[int, ...]] | None = None
    """The sources' columns here; None for a single source, which has all of them."""
    groups: Callable[[ModelConfig], int] | None = None
    """The columns lie in so many groups, each an equal share of the first source, then of the
    second and so on; None: in one, the sources one behind the other."""


@dataclasses.dataclass(frozen=True)
class Table:
    """How the checkpoints of one family are converted."""

    rules: tuple[Rule, ...]
    """The first rule of a path counts."""
    ignored: tuple[str, ...] = ()
    """Patterns of checkpoint tensors that carry nothing."""

    def rule(self, path: str) -> tuple[Rule, str]:
        """The rule for one of our paths, and the layer number that stands for `{i}` ("" without).

        A declared path without a rule is our mistake, not the user's: KeyError.
        """
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", path)
        layer = match[1] if match else ""
        pattern = f"layers.{{i}}.{match[2]}" if match else path
        for rule in self.rules:
            if rule.path == pattern:
                return rule, layer
        raise KeyError(f"no conversion rule for parameter {path}")

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may hold the tensor `name` without our using it."""
        return any(re.fullmatch(re.escape(p).replace(r"\{i\}", r"\d+"), name) for p in self.ignored)


def _qkv_widths(config: ModelConfig) -> tuple[int, ...]:
    kv = config.num_kv_heads * config.head_dim
    return (config.num_heads * config.head_dim, kv, kv)


def _kv_heads(config: ModelConfig) -> int:
    return config.num_kv_heads


def _gate_up_widths(config: ModelConfig) -> tuple[int, ...]:
    return (config.intermediate_size, config.intermediate_size)


def _linear(
    path: str, *names: str, widths=None, groups=None, bias: bool = False
) -> tuple[Rule, ...]:
    """Rules of a projection made of `names` side by side: its kernel, and its bias if any."""
    sources = tuple(_LAYER + name for name in names)
    weights = tuple(source + ".weight" for source in sources)
    kernel = Rule(f"layers.{{i}}.{path}.kernel", weights, True, widths, groups)
    if not bias:
        return (kernel,)
    biases = tuple(source + ".bias" for source in sources)
    return (kernel, Rule(f"layers.{{i}}.{path}.bias", biases, False, widths, groups))


def _norm(path: str, name: str) -> Rule:
    return Rule(f"layers.{{i}}.{path}.scale", (f"{_LAYER}{name}.weight",))


def _decoder(*, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False):
    """The rules of a Llama-like decoder."""
    attn, mlp = "self_attn.", "mlp."
    return (
        Rule("embed.embedding", ("model.embed_tokens.weight",)),
        Rule("final_norm.scale", ("model.norm.weight",)),
        Rule("lm_head.embedding", ("lm_head.weight",)),
        _norm("input_norm", "input_layernorm"),
        _norm("post_norm", "post_attention_layernorm"),
        *_linear(
            "attn.qkv",
            *(attn + name for name in ("q_proj", "k_proj", "v_proj")),
            widths=_qkv_widths,
            groups=_kv_heads,
            bias=qkv_bias,
        ),
        *_linear("attn.o", attn + "o_proj", bias=o_bias),
        *_linear(
            "mlp.gate_up",
            *(mlp + name for name in ("gate_proj", "up_proj")),
            widths=_gate_up_widths,
            bias=mlp_bias,
        ),
        *_linear("mlp.down", mlp + "down_proj", bias=mlp_bias),
    )


_QK_NORM = (_norm("attn.q_norm", "self_attn.q_norm"), _norm("attn.k_norm", "self_attn.k_norm"))

# Old checkpoints store the RoPE frequencies; they follow from the config.
_OLD_ROPE = (_LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

_TABLES: dict[str, Table] = {
    "LlamaForCausalLM": Table(_decoder(qkv_bias=True, o_bias=True, mlp_bias=True), _OLD_ROPE),
    "MistralForCausalLM": Table(_decoder(), _OLD_ROPE),
    "Qwen2ForCausalLM": Table(_decoder(qkv_bias=True), _OLD_ROPE),
    "Qwen3ForCausalLM": Table(_decoder(qkv_bias=True, o_bias=True) + _QK_NORM, _OLD_ROPE),
}


def table_for(config: ModelConfig) -> Table:
    """The family's table; a tied model may carry a copy of its embedding as lm_head.weight.

    Raises NotSupportedError for an architecture without one.
    """
    table = _TABLES.get(config.architecture)
    if table is None:
        raise NotSupportedError(
            f"no conversion table for {config.architecture}; there is one for {', '.join(_TABLES)}"
        )
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return Table(table.rules, table.ignored + tied)
