"""What the families are made of: Embedding, Linear, RMSNorm, MLP. Activations keep x's dtype.

Letters: T tokens, V vocabulary, D model dim, F mlp dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import NotSupportedError
from jaxserve.models.ops import Ops, Stream
from jaxserve.models.quantization import kernel_dtype, quantize
from jaxserve.shown import quoted

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
    """kernel [in, out] (+ bias [out]); how it is applied is up to `Ops`.

    quantization: a scheme of models.quantization, whose kernel has a kernel_scale [out] float32.
    """

    def __init__(
        self, size_in: int, size_out: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs | None,
        quantization: str | None = None,
    ):  # fmt: skip
        kernel, scale = normal_param(rngs, (size_in, size_out), dtype), None
        if quantization is not None:
            values, steps = quantize(kernel[...], kernel_dtype(quantization))
            kernel, scale = nnx.Param(values), nnx.Param(steps)
        self.kernel, self.kernel_scale = kernel, scale
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None

    def read(
        self, stream: Stream, ops: Ops, norm: RMSNorm, act: str | None = None
    ) -> tuple[jax.Array, Stream]:
        """norm(stream) [T, in] -> [T, out], or [T, out / 2] with a gated activation; the stream.
        See `Ops.linear_in`."""
        return ops.linear_in(
            stream, self.kernel[...], norm=norm.scale[...], eps=norm.eps, act=act, **self._rest()
        )

    def write(self, y: jax.Array, ops: Ops, stream: Stream) -> Stream:
        """y [T, in] -> the stream [T, out] with it. See `Ops.linear_out`."""
        return ops.linear_out(y, self.kernel[...], stream, **self._rest())

    def _rest(self) -> dict[str, jax.Array | None]:
        return {
            "bias": None if self.bias is None else self.bias[...],
            "scale": None if self.kernel_scale is None else self.kernel_scale[...],
        }


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [..., n] / rms(x) * scale [n], in float32; x's dtype (Zhang and Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


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
        quantization: str | None = None,
    ):
        activation(act)  # an unknown name fails here, not in the first step
        self.act = act
        options: dict[str, Any] = {
            "bias": bias, "dtype": dtype, "rngs": rngs, "quantization": quantization
        }  # fmt: skip
        self.gate_up = Linear(dim, 2 * mlp_dim, **options)
        self.down = Linear(mlp_dim, dim, **options)

    def __call__(self, stream: Stream, ops: Ops, norm: RMSNorm) -> Stream:
        """The stream [T, D] with mlp(norm(stream)) added."""
        y, stream = self.gate_up.read(stream, ops, norm, act=self.act)
        return self.down.write(y, ops, stream)


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
        f"hidden_act={quoted(name)} is not supported; supported: silu, gelu, gelu_pytorch_tanh, "
        "relu"
    )
