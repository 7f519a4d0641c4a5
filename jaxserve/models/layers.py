"""What the families are made of: Embedding, Linear, RMSNorm, MLP. Activations keep x's dtype.

Letters: T tokens, V vocabulary, D model dim, F mlp dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import NotSupportedError

_INIT_STD = 0.02


def normal_param(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """Random weights, or zeros where `rngs` is None (a declaration needs the shape only)."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(_INIT_STD * jax.random.normal(rngs.params(), shape, dtype))


class Embedding(nnx.Module):
    """Rows of a [V, D] table; the same table is the output projection of a tied model."""

    def __init__(self, vocab: int, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.embedding = normal_param(rngs, (vocab, dim), dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [T] int32 -> [T, D]. Ids outside the table take the nearest row."""
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B, D] -> [B, V] float32."""
        table = self.embedding[...]
        return jnp.einsum("bd,vd->bv", x, table, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """x [..., in] @ kernel [in, out] (+ bias [out])."""

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs | None
    ):
        self.kernel = normal_param(rngs, (size_in, size_out), dtype)
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Gated MLP: (act(x @ gate) * (x @ up)) @ down, gate and up fused (Shazeer 2020)."""

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        *,
        act: str,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
    ):
        activation(act)  # an unknown name fails here, not in the first step
        self.act = act
        self.gate_up = Linear(dim, 2 * mlp_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_dim, dim, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> [T, D]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)  # [T, F] each
        gated = activation(self.act)(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return self.down(gated.astype(x.dtype))


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function behind config.json's `hidden_act`; NotSupportedError for other names."""
    match name:
        case "silu" | "swish":
            return jax.nn.silu
        case "gelu":
            return lambda x: jax.nn.gelu(x, approximate=False)
        case "gelu_pytorch_tanh" | "gelu_new":
            return lambda x: jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu
    raise NotSupportedError(
        f"hidden_act={name!r} is not supported; supported: silu, gelu, gelu_pytorch_tanh, relu"
    )
