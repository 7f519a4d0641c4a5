"""The operations in plain mathematics, over whole sequences and without a cache: for training,
export and tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models import rope
from jaxserve.models.layers import activation, rms_norm
from jaxserve.models.ops import AttentionSpec, Residual


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseMeta:
    """Which of the T tokens see each other, beyond that each sees itself and those before it."""

    segments: jax.Array | None = None
    """[T] int32: the segment of each token, for sequences packed side by side, which do not see
    each other; None is one sequence."""
    reach: jax.Array | None = None
    """[T] int32: the last of the T tokens that each one sees, counted from 0: the last of its block
    where blocks see all of themselves (a picture's, in Gemma 3), or itself. None is itself."""


class DenseOps:
    """The `Ops` of a model that sees all its tokens at once; memory O(N T^2).

    meta: `DenseMeta`, or its segments alone; None is one sequence. `cache` passes through.
    """

    def linear_in(
        self,
        stream: Residual,
        kernel: jax.Array,
        *,
        norm: jax.Array | None,
        eps: float,
        centred: bool = False,
        bias: jax.Array | None = None,
        act: str | None = None,
        scale: jax.Array | None = None,
    ) -> tuple[jax.Array, Residual]:
        """See `Ops.linear_in`."""
        x = stream.x if norm is None else rms_norm(stream.x, norm, eps, centred=centred)
        y = product(x, kernel, bias, scale)
        if act is not None:
            gate, up = jnp.split(y, 2, axis=-1)
            y = activation(act)(gate) * up
        return y.astype(stream.x.dtype), stream

    def linear_out(
        self,
        y: jax.Array,
        kernel: jax.Array,
        stream: Residual,
        *,
        bias: jax.Array | None = None,
        scale: jax.Array | None = None,
        norm: jax.Array | None = None,
        eps: float = 0.0,
        factor: float = 1.0,
    ) -> Residual:
        """See `Ops.linear_out`."""
        added = product(y, kernel, bias, scale)
        if norm is not None:
            added = rms_norm(added, norm, eps)
        return Residual((added * factor + stream.x).astype(stream.x.dtype))

    def total(self, stream: Residual) -> jax.Array:
        """See `Ops.total`."""
        return stream.x

    def norm(
        self, stream: Residual, scale: jax.Array, eps: float, *, centred: bool = False
    ) -> jax.Array:
        """See `Ops.norm`."""
        return rms_norm(stream.x, scale, eps, centred=centred)

    def attend(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        meta: DenseMeta | jax.Array | None,
        spec: AttentionSpec,
        *,
        q_norm: jax.Array | None = None,
        k_norm: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """See `Ops.attend`. Softmax in float32."""
        if not isinstance(meta, DenseMeta):
            meta = DenseMeta(meta)
        q, k, v = split_heads(qkv, cos, sin, spec, q_norm, k_norm)
        tokens = q.shape[0]
        grouped = q.reshape(tokens, spec.num_kv_heads, -1, spec.head_dim)
        scores = jnp.einsum("tkgh,skh->kgts", grouped, k, preferred_element_type=jnp.float32)
        distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        visible = distance >= 0
        if meta.reach is not None:
            visible = jnp.arange(tokens) <= meta.reach[:, None]
        if spec.window is not None:
            visible &= distance < spec.window
        if meta.segments is not None:
            visible &= meta.segments[:, None] == meta.segments
        scores = scores * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("kgts,skh->tkgh", weights.astype(v.dtype), v)
        return out.reshape(tokens, -1), cache


def product(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, scale: jax.Array | None
) -> jax.Array:
    """x [T, in] times kernel [in, out], float32."""
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def split_heads(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    spec: AttentionSpec,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """qkv [T, (N + 2K) * H], see `Ops.attend` -> q [T, N, H], k and v [T, K, H]; q and k normalized
    and rotated."""
    tokens, group = qkv.shape[0], spec.num_heads // spec.num_kv_heads
    heads = qkv.reshape(tokens, spec.num_kv_heads, group + 2, spec.head_dim)
    q = heads[:, :, :group].reshape(tokens, spec.num_heads, spec.head_dim)
    k, v = heads[:, :, group], heads[:, :, group + 1]
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, spec.eps), rms_norm(k, k_norm, spec.eps)
    return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v
