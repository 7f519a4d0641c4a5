"""The decoder-only transformer. A family is one with a part exchanged: each part is named by a
class attribute of what it is part of.

Letters: T tokens, B rows, N query heads, K KV heads, H head dim, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
from flax import nnx

from jaxserve.models import rope
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import MLP, Embedding, Linear, RMSNorm
from jaxserve.models.make import Make
from jaxserve.models.ops import AttentionSpec, Ops, Residual
from jaxserve.models.rope_config import RopeConfig


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and fused q, k, v projections, the columns of a
    KV head side by side: see `Ops.attend`."""

    norm: ClassVar[type[RMSNorm]] = RMSNorm
    """Of the norms over the heads of q and k."""
    out_norm: RMSNorm | None = None
    """Norm of what goes into the stream, where a family has one."""

    def __init__(self, config: ModelConfig, index: int, make: Make):
        """index: of the layer."""
        heads, kv_heads = config.num_heads // make.parts, config.kv_heads(make.parts) // make.parts
        self.spec = AttentionSpec(
            layer=index,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            window=config.windows[index],
            eps=config.rms_norm_eps,
        )
        dim, width = config.hidden_size, heads * config.head_dim
        kv_width = kv_heads * config.head_dim
        self.qkv = Linear(dim, (width + 2 * kv_width,), make, bias=config.attention_bias)
        self.o = Linear(width, (dim,), make, bias=config.attention_out_bias)

        def head_norm() -> RMSNorm | None:
            if not config.qk_norm:
                return None
            return self.norm(config.head_dim, make, eps=config.rms_norm_eps)

        self.q_norm, self.k_norm = head_norm(), head_norm()

    def __call__(
        self,
        stream: Residual,
        norm: RMSNorm,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        meta: Any,
        ops: Ops,
    ) -> tuple[Residual, Any]:
        """The stream [T, D] with attention(norm(stream)) added, new cache. cos, sin [T, H/2]."""
        qkv, stream = self.qkv.read(stream, ops, norm)  # [T, (N + 2K) * H]
        out, cache = ops.attend(
            qkv,
            cos,
            sin,
            cache,
            meta,
            self.spec,
            q_norm=None if self.q_norm is None else self.q_norm.weights(),
            k_norm=None if self.k_norm is None else self.k_norm.weights(),
        )
        return self.o.write(out, ops, stream, self.out_norm), cache


class FeedForward(Protocol):
    """What a layer has behind attention."""

    def __init__(self, config: ModelConfig, index: int, make: Make): ...

    def __call__(self, stream: Residual, ops: Ops, norm: RMSNorm) -> Residual:
        """See `MLP`."""
        ...


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    attention: ClassVar[type[Attention]] = Attention
    """Of the first half."""
    feed_forward: ClassVar[type[FeedForward]] = MLP
    """Of the second half."""
    norm: ClassVar[type[RMSNorm]] = RMSNorm
    """Of the norms before both."""
    rope: RopeConfig
    """What the layer's cos and sin are made from; a family may choose it by the layer."""

    def __init__(self, config: ModelConfig, index: int, make: Make):
        """index: of the layer."""
        self.rope = config.rope
        self.input_norm = self.norm(config.hidden_size, make, eps=config.rms_norm_eps)
        self.attn = self.attention(config, index, make)
        self.post_norm = self.norm(config.hidden_size, make, eps=config.rms_norm_eps)
        self.mlp = self.feed_forward(config, index, make)

    def __call__(
        self, stream: Residual, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[Residual, Any]:
        """stream [T, D] -> [T, D], new cache. cos, sin [T, H/2]: of `rope`."""
        stream, cache = self.attn(stream, self.input_norm, cos, sin, cache, meta, ops)
        return self.mlp(stream, ops, self.post_norm), cache


class Decoder(nnx.Module):
    """Decoder-only transformer. Its parameters are the paths of `registry.declare(...).specs`."""

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    """A family whose mathematics need more than ModelConfig has adds fields in a subclass."""
    hf_defaults: ClassVar[Mapping[str, Any]] = {}
    """What transformers assumes for keys that an old config.json leaves out."""
    embedding: ClassVar[type[Embedding]] = Embedding
    """Of the input; an untied output projection is an `Embedding`."""
    layer: ClassVar[type[Layer]] = Layer
    """Of each of the L layers, which are unrolled."""
    norm: ClassVar[type[RMSNorm]] = RMSNorm
    """Of the norm behind the last layer."""

    def __init__(self, config: ModelConfig, make: Make):
        self.config = config
        tied = config.tie_word_embeddings
        self.embed = self.embedding(config.vocab_size, config.hidden_size, make, cut=tied)
        self.layers = nnx.List([self.layer(config, i, make) for i in range(config.num_layers)])
        self.final_norm = self.norm(config.hidden_size, make, eps=config.rms_norm_eps)
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, make)

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        """Fields of `config_class` that this family reads from config.json in its own way."""
        del hf
        return {}

    def __call__(
        self, token_ids: jax.Array, positions: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[jax.Array, Any]:
        """token_ids, positions [T] int32 -> hidden [T, D] after the final norm, new cache."""
        return self.run(self.embed(token_ids), positions, cache, meta, ops)

    def run(
        self, embedded: jax.Array, positions: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[jax.Array, Any]:
        """embedded [T, D], positions [T] int32 -> hidden [T, D] after the final norm, new cache.

        embedded: `embed(token_ids)`, or what stands in a token's place. `cache` goes through
        `ops.attend` of each layer with `meta`; the model reads neither.
        """
        angles = self.angles(positions)
        stream = Residual(embedded)
        for layer in self.layers:
            stream, cache = layer(stream, *angles[layer.rope], cache, meta, ops)
        return ops.norm(stream, self.final_norm.weights(), self.final_norm.eps), cache

    def angles(self, positions: jax.Array) -> dict[RopeConfig, tuple[jax.Array, jax.Array]]:
        """cos, sin [T, H/2] float32 of every `rope` that a layer asks for, each made once."""
        wanted = dict.fromkeys(layer.rope for layer in self.layers)
        return {each: rope.cos_sin(each, self.config.head_dim, positions) for each in wanted}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, D] after the final norm -> [B, V] float32."""
        table = self.embed if self.lm_head is None else self.lm_head
        return table.logits(hidden)
