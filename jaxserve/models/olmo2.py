"""OLMo 2: norms on what attention and MLP add instead of on what they read, and a norm of q and k
over all heads (OLMo team 2025; HF modeling_olmo2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models import values
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Attention, Decoder, Layer
from jaxserve.models.layers import MLP, RMSNorm
from jaxserve.models.make import Make


class WholeNorm(nnx.Module):
    """RMSNorm of q over its N * H numbers and of k over its K * H. Where the heads are cut over
    devices, each has some of the weights, and the squares are summed over all."""

    def __init__(self, config: ModelConfig, make: Make):
        kv_heads, heads = config.kv_heads(make.parts), config.num_heads
        self.axis = make.axis
        self.eps = config.rms_norm_eps
        self.head_dim, self.group = config.head_dim, heads // kv_heads
        self.counts = (heads * config.head_dim, kv_heads * config.head_dim)
        own = kv_heads // make.parts
        self.scale = make.ones(own * (self.group + 1) * self.head_dim)

    def __call__(self, qkv: jax.Array) -> jax.Array:
        """qkv [T, (N + 2K) * H] as `Ops.attend` takes it, in float32 inside; v stays."""
        heads = qkv.reshape(len(qkv), -1, self.group + 2, self.head_dim)
        qk = heads[:, :, :-1].astype(jnp.float32)
        squares = jnp.sum(qk * qk, axis=(1, 3))  # [T, G + 1]
        sums = jnp.stack([squares[:, :-1].sum(axis=1), squares[:, -1]], axis=1)
        if self.axis is not None:
            sums = jax.lax.psum(sums, self.axis)
        shrink = jax.lax.rsqrt(sums / jnp.asarray(self.counts, jnp.float32) + self.eps)
        shrink = jnp.repeat(
            shrink, jnp.asarray((self.group, 1)), axis=1, total_repeat_length=self.group + 1
        )
        weights = self.scale[...].astype(jnp.float32).reshape(qk.shape[1:])
        qk = (qk * shrink[:, None, :, None] * weights).astype(qkv.dtype)
        return jnp.concatenate([qk, heads[:, :, -1:]], axis=2).reshape(qkv.shape)


class Olmo2Attention(Attention):
    """Both norms are behind products."""

    out_norm_class = RMSNorm

    def __init__(self, config: ModelConfig, index: int, make: Make):
        super().__init__(config, index, make)
        self.whole_norm = WholeNorm(config, make)


class Olmo2MLP(MLP):
    """A norm behind the last product."""

    out_norm_class = RMSNorm


class Olmo2Layer(Layer):
    """Attention and MLP read the stream as it is."""

    attention = Olmo2Attention
    feed_forward = Olmo2MLP
    norm = None


class Olmo2(Decoder):
    """See the parts."""

    layer = Olmo2Layer
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
    }

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        bias = values.flag(hf, "attention_bias")
        return {"attention_bias": bias, "attention_out_bias": bias}
