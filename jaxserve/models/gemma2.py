"""Gemma 2: norms before and behind attention and MLP, soft caps, and a window in every other layer
(Gemma team 2024; HF modeling_gemma2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jaxserve.errors import NotSupportedError
from jaxserve.models import values
from jaxserve.models.config import cap_of, patterned_windows
from jaxserve.models.decoder import Attention, Decoder, Layer
from jaxserve.models.layers import MLP, Embedding, Float32Norm
from jaxserve.models.make import Make


class GemmaEmbedding(Embedding):
    """Rows times sqrt(D), which is rounded to the weights' dtype first."""

    def __init__(self, vocab: int, dim: int, make: Make, *, cut: bool = True, scale: float = 1.0):
        rounded = float(np.asarray(scale, make.dtype))
        super().__init__(vocab, dim, make, cut=cut, scale=rounded)


class GemmaAttention(Attention):
    """A norm behind the output projection; another over each head of q and k, where there is one
    (Gemma 3)."""

    norm = Float32Norm
    out_norm_class = Float32Norm


class GemmaMLP(MLP):
    """A norm behind the last product."""

    out_norm_class = Float32Norm


class GemmaLayer(Layer):
    """`post_norm` is what Hugging Face calls pre_feedforward_layernorm."""

    attention = GemmaAttention
    feed_forward = GemmaMLP
    norm = Float32Norm


class Gemma2(Decoder):
    """See the parts."""

    embedding = GemmaEmbedding
    layer = GemmaLayer
    norm = Float32Norm
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        return gemma_fields(hf) | {"windows": patterned_windows(hf, 2)}


def gemma_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 read alike."""
    if values.flag(hf, "use_bidirectional_attention"):
        raise NotSupportedError("config.json: use_bidirectional_attention=True is not supported")
    bias = values.flag(hf, "attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "hidden_act": values.text(hf, "hidden_activation", "gelu_pytorch_tanh"),
        "query_scale": values.number(hf, "query_pre_attn_scalar", above=0) ** -0.5,
        "score_cap": cap_of(hf, "attn_logit_softcapping"),
        "logit_cap": cap_of(hf, "final_logit_softcapping"),
        "embed_scale": values.size(hf, "hidden_size") ** 0.5,
    }
