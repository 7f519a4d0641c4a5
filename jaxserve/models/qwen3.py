"""Qwen3: Llama with RMSNorm on each head of q and k (Qwen team 2025; HF modeling_qwen3).

Letters: T tokens, N query heads, K KV heads, H head dim, D model dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import ModelConfig, layer_windows
from jaxserve.models.layers import RMSNorm
from jaxserve.models.llama import Attention, Layer, Llama


class Qwen3Attention(Attention):
    """q and k are normalized over H before they are rotated."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        super().__init__(config, index, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, D] -> q [T, N, H], k and v [T, K, H], before rotation."""
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Layer(Layer):
    attention: ClassVar[type[Attention]] = Qwen3Attention


class Qwen3(Llama):
    layer: ClassVar[type[Layer]] = Qwen3Layer
    hf_defaults: ClassVar[dict[str, Any]] = {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        bias = bool(hf.get("attention_bias", False))
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "qk_norm": True,
            "windows": layer_windows(hf),
        }
