"""One table per family: which Hugging Face tensors make up each parameter, and how.

A rule's `path` is one of ours (see `registry.declare(...).specs`), its `sources` are Hugging Face
names; `{i}` is the layer number in both. Rules whose path a model does not declare are unused, so
optional parts (biases, an untied head) need no table of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from converters.head_order import Order, half_split, interleaved
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
    """Columns here, of each source, or of each part of a single source that is fused already; None
    for a source that is one part."""
    groups: Callable[[ModelConfig], int] | None = None
    """The columns lie in so many groups, each an equal share of the first part, then of the second
    and so on; None: in one, the parts one behind the other."""
    orders: Callable[[ModelConfig], tuple[Order | None, ...]] | None = None
    """Of the rows in each head of a part, None for a part that keeps the checkpoint's order; None
    for parts that all do."""
    axes: tuple[int, ...] | None = None
    """Of a convolution's kernel, behind its outputs: one axis here."""
    plus: float = 0.0
    """Added to each number here, in float32."""
    rows: int | None = None
    """Of each transposed source; what rows there are more here are zeros. None: there are none."""
    padding: int = 0
    """Columns of zeros here, behind those of each source, which is one part."""


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
        match = re.fullmatch(r"((?:\w+\.)*?)(\d+)\.(.*)", path)
        layer = match[2] if match else ""
        pattern = f"{match[1]}{{i}}.{match[3]}" if match else path
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


def _ordered_qkv(
    order: Callable[[ModelConfig], Order],
) -> Callable[[ModelConfig], tuple[Order | None, ...]]:
    return lambda config: (order(config), order(config), None)


def _gate_up_widths(config: ModelConfig) -> tuple[int, ...]:
    return (config.intermediate_size, config.intermediate_size)


def _linear(
    path: str, *names: str, widths=None, groups=None, orders=None, bias: bool = False
) -> tuple[Rule, ...]:
    """Rules of a projection made of `names` side by side: its kernel, and its bias if any."""
    sources = tuple(_LAYER + name for name in names)
    weights = tuple(source + ".weight" for source in sources)
    kernel = Rule(f"layers.{{i}}.{path}.kernel", weights, True, widths, groups, orders)
    if not bias:
        return (kernel,)
    biases = tuple(source + ".bias" for source in sources)
    return (kernel, Rule(f"layers.{{i}}.{path}.bias", biases, False, widths, groups, orders))


def _norm(path: str, name: str, plus: float = 0.0) -> Rule:
    return Rule(f"layers.{{i}}.{path}.scale", (f"{_LAYER}{name}.weight",), plus=plus)


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def _decoder(
    *,
    qkv: tuple[str, ...] = _QKV,
    gate_up: tuple[str, ...] = _GATE_UP,
    head_order: Callable[[ModelConfig], Order] | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
):
    """The rules of a Llama-like decoder. qkv, gate_up: the tensors' names; one where a checkpoint
    has them fused. head_order: of q and k."""
    attn, mlp = "self_attn.", "mlp."
    return (
        Rule("embed.embedding", ("model.embed_tokens.weight",)),
        Rule("final_norm.scale", ("model.norm.weight",)),
        Rule("lm_head.embedding", ("lm_head.weight",)),
        _norm("input_norm", "input_layernorm"),
        _norm("post_norm", "post_attention_layernorm"),
        *_linear(
            "attn.qkv",
            *(attn + name for name in qkv),
            widths=_qkv_widths,
            groups=_kv_heads,
            orders=head_order and _ordered_qkv(head_order),
            bias=qkv_bias,
        ),
        *_linear("attn.o", attn + "o_proj", bias=o_bias),
        *_linear(
            "mlp.gate_up",
            *(mlp + name for name in gate_up),
            widths=_gate_up_widths,
            bias=mlp_bias,
        ),
        *_linear("mlp.down", mlp + "down_proj", bias=mlp_bias),
    )


_QK_NORM = (_norm("attn.q_norm", "self_attn.q_norm"), _norm("attn.k_norm", "self_attn.k_norm"))

# Norms behind attention and MLP; the first has the name of Llama's before the MLP.
_OUT_NORMS = (
    _norm("attn.out_norm", "post_attention_layernorm"),
    _norm("mlp.out_norm", "post_feedforward_layernorm"),
)

# Gemma stores what a norm's weights differ from 1 by.
_GEMMA = (
    Rule("final_norm.scale", ("model.norm.weight",), plus=1.0),
    *(
        _norm(path, name, plus=1.0)
        for path, name in (
            ("input_norm", "input_layernorm"),
            ("attn.q_norm", "self_attn.q_norm"),
            ("attn.k_norm", "self_attn.k_norm"),
            ("attn.out_norm", "post_attention_layernorm"),
            ("post_norm", "pre_feedforward_layernorm"),
            ("mlp.out_norm", "post_feedforward_layernorm"),
        )
    ),
    *_decoder(qkv_bias=True, o_bias=True),
)


def _qk_widths(config: ModelConfig) -> tuple[int, ...]:
    return _qkv_widths(config)[:2]


_WHOLE_NORM = Rule(
    "layers.{i}.attn.whole_norm.scale",
    tuple(f"{_LAYER}self_attn.{name}_norm.weight" for name in "qk"),
    widths=_qk_widths,
    groups=_kv_heads,
)
_OLMO = (_WHOLE_NORM, *_OUT_NORMS, *_decoder(qkv_bias=True, o_bias=True))
_BIASED = _decoder(qkv_bias=True, o_bias=True, mlp_bias=True)

# Old checkpoints store the RoPE frequencies; they follow from the config.
_OLD_ROPE = (_LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

_FUSED_GATE_UP = ("gate_up_proj",)
_GLM4_NORMS = (
    _norm("attn.out_norm", "post_self_attn_layernorm"),
    _norm("mlp.out_norm", "post_mlp_layernorm"),
)
_GLM = _decoder(gate_up=_FUSED_GATE_UP, head_order=interleaved, qkv_bias=True)

_TABLES: dict[str, Table] = {
    "Cohere2ForCausalLM": Table(_decoder(head_order=interleaved, qkv_bias=True, o_bias=True)),
    "Gemma2ForCausalLM": Table(_GEMMA),
    "Gemma3ForCausalLM": Table(_GEMMA),
    "Glm4ForCausalLM": Table((*_GLM4_NORMS, *_GLM)),
    "GlmForCausalLM": Table(_GLM),
    "GraniteForCausalLM": Table(_BIASED),
    "LlamaForCausalLM": Table(_BIASED, _OLD_ROPE),
    "MistralForCausalLM": Table(_decoder(), _OLD_ROPE),
    "Olmo2ForCausalLM": Table(_OLMO),
    "Olmo3ForCausalLM": Table(_OLMO),
    "Phi3ForCausalLM": Table(
        _decoder(qkv=("qkv_proj",), gate_up=_FUSED_GATE_UP, head_order=half_split), _OLD_ROPE
    ),
    "Qwen2ForCausalLM": Table(_decoder(qkv_bias=True), _OLD_ROPE),
    "Qwen3ForCausalLM": Table(_decoder(qkv_bias=True, o_bias=True) + _QK_NORM, _OLD_ROPE),
    "SmolLM3ForCausalLM": Table(_BIASED),
}


_DECODERS = {
    # architecture with a tower: the one whose decoder it has
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Idefics3ForConditionalGeneration": "LlamaForCausalLM",
    "LlavaForConditionalGeneration": "LlamaForCausalLM",
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
    "SmolVLMForConditionalGeneration": "LlamaForCausalLM",
}


def table_for(config: ModelConfig) -> Table:
    """The decoder's table; a tied model may carry a copy of its embedding as lm_head.weight.

    Raises NotSupportedError for an architecture without one.
    """
    name = config.architecture
    table = _TABLES.get(_DECODERS.get(name, name))
    if table is None:
        known = ", ".join((*_TABLES, *_DECODERS))
        raise NotSupportedError(f"no conversion table for {name}; there is one for {known}")
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return Table(table.rules, table.ignored + tied)
