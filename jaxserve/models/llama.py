"""Llama 2, 3, 3.1-3.3, SmolLM (Touvron et al. 2023; HF modeling_llama). The other families
are this one with a part exchanged.

Letters: T tokens, B rows, N query heads, K KV heads, H head dim, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models import rope
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import MLP, Embedding, Linear, RMSNorm


class Attend(Protocol):
    """How tokens see each other. The models know nothing else about caches and batches.

    q [T, N, H], k and v [T, K, H] of the new tokens, already rotated; `cache` and `meta` are the
    caller's. `scale` multiplies the scores; `window` w keeps the last w positions, the current
    one included. Returns out [T, N, H] and the layer's new cache.
    """

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: Any,
        meta: Any,
        *,
        scale: float,
        window: int | None,
    ) -> tuple[jax.Array, Any]: ...


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and fused q, k, v projections."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.config = config
        self.window = config.windows[index]
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(
            config.hidden_size,
            heads * config.head_dim,
            bias=config.attention_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.o = Linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_out_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, D] -> q [T, N, H], k and v [T, K, H], before rotation."""
        c = self.config
        heads = self.qkv(x).reshape(x.shape[0], -1, c.head_dim)
        q, k, v = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)
        return q, k, v

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """x [T, D], cos and sin [T, H/2] -> [T, D], new cache."""
        q, k, v = self.project(x)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        scale = self.config.head_dim**-0.5
        out, cache = attend(q, k, v, cache, meta, scale=scale, window=self.window)
        return self.o(out.reshape(x.shape[0], -1)), cache


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    attention: ClassVar[type[Attention]] = Attention

    def __init__(self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attn = self.attention(config, index, dtype=dtype, rngs=rngs)
        self.post_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """x [T, D] -> [T, D], new cache."""
        out, cache = self.attn(self.input_norm(x), cos, sin, cache, meta, attend)
        x = x + out
        return x + self.mlp(self.post_norm(x)), cache


class Llama(nnx.Module):
    """Decoder-only transformer. Its parameters are the paths of `registry.declare(...).specs`.

    rngs: source of random weights (training from scratch); None starts from zeros.
    """

    layer: ClassVar[type[Layer]] = Layer
    hf_defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    """What transformers assumes for keys that an old config.json leaves out."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [self.layer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        )

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        """ModelConfig fields that this family reads from config.json in its own way."""
        bias = bool(hf.get("attention_bias", False))
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": bool(hf.get("mlp_bias", False)),
        }

    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        cache: Sequence[Any],
        meta: Any,
        attend: Attend,
    ) -> tuple[jax.Array, list[Any]]:
        """token_ids, positions [T] int32 -> hidden [T, D] after the final norm, new cache.

        `cache` has one entry per layer, handed to `attend` with `meta`, both unread.
        """
        cos, sin = rope.cos_sin(self.config.rope, self.config.head_dim, positions)
        x = self.embed(token_ids)
        new_cache = []
        for layer, entry in zip(self.layers, cache, strict=True):
            x, entry = layer(x, cos, sin, entry, meta, attend)
            new_cache.append(entry)
        return self.final_norm(x), new_cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, D] after the final norm -> [B, V] float32."""
        table = self.embed if self.lm_head is None else self.lm_head
        return table.logits(hidden)
