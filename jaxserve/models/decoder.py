"""The decoder-only transformer. A family is one with a part exchanged: each part is named by a
class attribute of what it is part of.

Letters: T tokens, B rows, N query heads, K KV heads, H head dim, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models import rope
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import MLP, Embedding, Linear, RMSNorm, stream_norm
from jaxserve.models.make import Make
from jaxserve.models.ops import AttentionSpec, Ops, Residual
from jaxserve.models.rope_config import RopeConfig


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and fused q, k, v projections, the columns of a
    KV head side by side: see `Ops.attend`."""

    norm: ClassVar[type[RMSNorm]] = RMSNorm
    """Of the norms over the heads of q and k."""
    out_norm_class: ClassVar[type[RMSNorm] | None] = None
    """Of a norm of what goes into the stream, where a family has one."""
    whole_norm: Callable[[jax.Array], jax.Array] | None = None
    """Norm of q and k over all their heads, [T, (N + 2K) * H], where a family has one."""

    def __init__(self, config: ModelConfig, index: int, make: Make):
        """index: of the layer."""
        heads, kv_heads = config.num_heads // make.parts, config.kv_heads(make.parts) // make.parts
        self.spec = AttentionSpec(
            layer=index,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.head_dim,
            scale=config.query_scale,
            window=config.windows[index],
            eps=config.rms_norm_eps,
            soft_cap=config.score_cap,
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
        self.out_norm = stream_norm(self.out_norm_class, config, make)
        self.factor = config.residual_scale

    def __call__(
        self,
        stream: Residual,
        norm: RMSNorm | None,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        meta: Any,
        ops: Ops,
    ) -> tuple[Residual, Any]:
        """The stream [T, D] with attention(norm(stream)) added, new cache. cos, sin [T, H/2]."""
        qkv, stream = self.qkv.read(stream, ops, norm)  # [T, (N + 2K) * H]
        if self.whole_norm is not None:
            qkv = self.whole_norm(qkv)
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
        return self.o.write(out, ops, stream, self.out_norm, self.factor), cache


class FeedForward(Protocol):
    """What a layer has behind attention."""

    def __init__(self, config: ModelConfig, index: int, make: Make): ...

    def __call__(self, stream: Residual, ops: Ops, norm: RMSNorm | None) -> Residual:
        """See `MLP`."""
        ...


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    attention: ClassVar[type[Attention]] = Attention
    """Of the first half."""
    feed_forward: ClassVar[type[FeedForward]] = MLP
    """Of the second half."""
    norm: ClassVar[type[RMSNorm] | None] = RMSNorm
    """Of the norms before both; None: both read the stream as it is."""
    rope: RopeConfig
    """What the layer's cos and sin are made from."""

    def __init__(self, config: ModelConfig, index: int, make: Make):
        """index: of the layer."""
        self.rope = config.layer_ropes[index]
        self.input_norm = stream_norm(self.norm, config, make)
        self.attn = self.attention(config, index, make)
        self.post_norm = stream_norm(self.norm, config, make)
        self.mlp = self.feed_forward(config, index, make)

    def __call__(
        self, stream: Residual, cos: jax.Array, sin: jax.Array, cache: Any, meta: Any, ops: Ops
    ) -> tuple[Residual, Any]:
        """stream [T, D] -> [T, D], new cache. cos, sin [T, H/2]: of `rope`."""
        stream, cache = self.attn(stream, self.input_norm, cos, sin, cache, meta, ops)
        return self.mlp(stream, ops, self.post_norm), cache


Watch = Callable[[int, Residual], object]
"""Told, while a model is traced, what layer i reads of the stream [T, D]: 0 the embeddings."""


class Decoder(nnx.Module):
    """Decoder-only transformer. Its parameters are the paths of `registry.declare(...).specs`."""

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    """A family whose mathematics need more than ModelConfig has adds fields in a subclass."""
    hf_defaults: ClassVar[Mapping[str, Any]] = {}
    """What transformers assumes for keys that an old config.json leaves out, and as `default_theta`
    its base of RoPE where that is not 10,000."""
    ropes_by_kind: ClassVar[bool] = False
    """Layers with a window have RoPE parameters of their own, see `rope_config.of_kind`."""
    rotates_part: ClassVar[bool] = False
    """A config may say that a part of each head is rotated; the family's conversion table puts the
    rotated pairs where `rope.rotate` has them."""
    embedding: ClassVar[type[Embedding]] = Embedding
    """Of the input; an untied output projection is an `Embedding`."""
    layer: ClassVar[type[Layer]] = Layer
    """Of each of the L layers, which are unrolled."""
    norm: ClassVar[type[RMSNorm]] = RMSNorm
    """Of the norm behind the last layer."""

    def __init__(self, config: ModelConfig, make: Make):
        self.config = config
        tied = config.tie_word_embeddings
        self.embed = self.embedding(
            config.vocab_size, config.hidden_size, make, cut=tied, scale=config.embed_scale
        )
        self.layers = nnx.List([self.layer(config, i, make) for i in range(config.num_layers)])
        self.final_norm = self.norm(config.hidden_size, make, eps=config.rms_norm_eps)
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, make)

    @staticmethod
    def config_fields(hf: dict[str, Any]) -> dict[str, Any]:
        """Fields of `config_class` that this family reads from config.json in its own way."""
        del hf
        return {}

    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        cache: Any,
        meta: Any,
        ops: Ops,
        watch: Watch | None = None,
    ) -> tuple[jax.Array, Any]:
        """token_ids, positions [T] int32 -> hidden [T, D] after the final norm, new cache."""
        return self.run(self.embed(token_ids), positions, cache, meta, ops, watch)

    def run(
        self,
        embedded: jax.Array,
        positions: jax.Array,
        cache: Any,
        meta: Any,
        ops: Ops,
        watch: Watch | None = None,
        added: Sequence[jax.Array] = (),
    ) -> tuple[jax.Array, Any]:
        """embedded [T, D], positions [T] int32 -> hidden [T, D] after the final norm, new cache.

        embedded: `embed(token_ids)`, or what stands in a token's place. positions: or [3, T], see
        `rope.cos_sin`. `cache` goes through `ops.attend` of each layer with `meta`; the model reads
        neither. added: [T, D] each, what comes to the stream behind the first layers, one each
        (deepstack); zeros for text.
        """
        angles = self.angles(positions)
        stream = Residual(embedded)
        for index, layer in enumerate(self.layers):
            if watch is not None:
                watch(index, stream)
            stream, cache = layer(stream, *angles[layer.rope], cache, meta, ops)
            if index < len(added):
                stream = Residual(stream.x + added[index], stream.pending)
        norm = self.final_norm
        return ops.norm(stream, norm.weights(), norm.eps, centred=norm.centred), cache

    def angles(self, positions: jax.Array) -> dict[RopeConfig, tuple[jax.Array, jax.Array]]:
        """positions [T] or [3, T] -> cos, sin [T, H/2] float32 of every `rope` that a layer asks
        for, each made once."""
        wanted = dict.fromkeys(layer.rope for layer in self.layers)
        return {each: rope.cos_sin(each, self.config.head_dim, positions) for each in wanted}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, D] after the final norm -> [B, V] float32."""
        table = self.embed if self.lm_head is None else self.lm_head
        logits, cap = table.logits(hidden), self.config.logit_cap
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)
