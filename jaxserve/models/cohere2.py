"""Command R7B, Command A: attention and MLP side by side behind one LayerNorm; sliding windows with
RoPE in three layers of four, all tokens without it in the fourth (Cohere 2024; HF
modeling_cohere2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxserve.models import values
from jaxserve.models.config import ModelConfig, patterned_windows, ropes_where
from jaxserve.models.decoder import Attention, Decoder, Layer
from jaxserve.models.layers import MLP, LayerNorm
from jaxserve.models.make import Make
from jaxserve.models.ops import Ops, Residual


class Cohere2Layer(Layer):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, make: Make):
        nnx.Module.__init__(self)  # one norm, not the two of `Layer`
        self.rope = config.layer_ropes[index]
        self.input_norm = LayerNorm(config.hidden_size, make, eps=config.rms_norm_eps)
        self.attn = Attention(config, index, make)
        self.mlp = MLP(config, index, make)

    def __call__(
        self, stream: Residual, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[Residual, Any]:
        """See `Layer`."""
        y, stream = self.mlp.read(stream, ops, self.input_norm)
        stream, cache = self.attn(stream, self.input_norm, cos, sin, cache, meta, ops)
        return self.mlp.write(y, ops, stream), cache


class Cohere2(Decoder):
    """See the parts."""

    layer = Cohere2Layer
    norm = LayerNorm
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "sliding_window": 4096,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        bias = values.flag(hf, "attention_bias")
        windows = patterned_windows(hf, values.size(hf, "sliding_window_pattern", 4))
        return {
            "rms_norm_eps": values.number(hf, "layer_norm_eps", least=0),
            "attention_bias": bias,
            "attention_out_bias": bias,
            "windows": windows,
            "layer_ropes": ropes_where(hf, (window is not None for window in windows)),
            "logit_scale": values.number(hf, "logit_scale", above=0),
        }
