"""Llama 2, 3, 3.1-3.3, SmolLM (Touvron et al. 2023; HF modeling_llama). The other families
are this one with a part exchanged.

Letters: T tokens, B rows, N query heads, K KV heads, H head dim, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models import rope, values
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import MLP, Embedding, Linear, RMSNorm
from jaxserve.models.ops import AttentionSpec, Ops, Stream


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and fused q, k, v projections."""

    def __init__(
        self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None,
        quantization: str | None = None,
    ):  # fmt: skip
        self.spec = AttentionSpec(
            layer=index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            window=config.windows[index],
            eps=config.rms_norm_eps,
        )
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(
            config.hidden_size,
            heads * config.head_dim,
            bias=config.attention_bias,
            dtype=dtype,
            rngs=rngs,
            quantization=quantization,
        )
        self.o = Linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_out_bias,
            dtype=dtype,
            rngs=rngs,
            quantization=quantization,
        )

        def head_norm() -> RMSNorm | None:
            if not config.qk_norm:
                return None
            return RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)

        self.q_norm, self.k_norm = head_norm(), head_norm()

    def __call__(
        self, stream: Stream, norm: RMSNorm, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any,
        ops: Ops,
    ) -> tuple[Stream, Any]:  # fmt: skip
        """The stream [T, D] with attention(norm(stream)) added, new cache. cos, sin [T, H/2]."""
        qkv, stream = self.qkv.read(stream, ops, norm)  # [T, (N + 2K) * H]
        out, cache = ops.attend(
            qkv, cos, sin, cache, meta, self.spec,
            q_norm=None if self.q_norm is None else self.q_norm.scale[...],
            k_norm=None if self.k_norm is None else self.k_norm.scale[...],
        )  # fmt: skip
        return self.o.write(out, ops, stream), cache


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(
        self, config: ModelConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None,
        quantization: str | None = None,
    ):  # fmt: skip
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, index, dtype=dtype, rngs=rngs, quantization=quantization)
        self.post_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
            quantization=quantization,
        )

    def __call__(
        self, stream: Stream, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[Stream, Any]:
        """stream [T, D] -> [T, D], new cache."""
        stream, cache = self.attn(stream, self.input_norm, cos, sin, cache, meta, ops)
        return self.mlp(stream, ops, self.post_norm), cache


class Llama(nnx.Module):
    """Decoder-only transformer. Its parameters are the paths of `registry.declare(...).specs`.

    rngs: source of random weights (training from scratch); None starts from zeros. quantization: a
    scheme of models.quantization for the layers' linear kernels; embeddings, LM head, norms and
    biases keep `dtype`.
    """

    hf_defaults: ClassVar[dict[str, Any]] = {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    """What transformers assumes for keys that an old config.json leaves out."""

    def __init__(
        self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None,
        quantization: str | None = None,
    ):  # fmt: skip
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                Layer(config, i, dtype=dtype, rngs=rngs, quantization=quantization)
                for i in range(config.num_layers)
            ]
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
        bias = values.flag(hf, "attention_bias")
        return {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": values.flag(hf, "mlp_bias"),
        }

    def __call__(
        self, token_ids: jax.Array, positions: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[jax.Array, Any]:
        """token_ids, positions [T] int32 -> hidden [T, D] after the final norm, new cache.

        `cache` goes through `ops.attend` of each layer with `meta`; the model reads neither.
        """
        cos, sin = rope.cos_sin(self.config.rope, self.config.head_dim, positions)
        stream = Stream(self.embed(token_ids))
        for layer in self.layers:
            stream, cache = layer(stream, cos, sin, cache, meta, ops)
        return ops.norm(stream, self.final_norm.scale[...], self.final_norm.eps), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, D] after the final norm -> [B, V] float32."""
        table = self.embed if self.lm_head is None else self.lm_head
        return table.logits(hidden)
