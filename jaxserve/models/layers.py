"""What the families are made of: Embedding, Linear, RMSNorm, MLP. Activations keep x's dtype.

Letters: T tokens, V vocabulary, D model dim, F mlp dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import NotSupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.make import Make
from jaxserve.models.ops import Ops, Residual
from jaxserve.models.quantization import kernel_dtype, quantize
from jaxserve.shown import quoted


class Embedding(nnx.Module):
    """Rows of a [V, D] table; the same table is the output projection of a tied model."""

    def __init__(self, vocab: int, dim: int, make: Make, *, cut: bool = True, scale: float = 1.0):
        """cut: where the model is cut over devices, each has some of the rows. scale: rows are
        multiplied by it, where they do not make logits."""
        self.vocab = vocab
        self.scale = scale
        self.axis = make.axis if cut else None
        self.embedding = make.normal(vocab // make.parts if cut else vocab, dim)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [T] int32 -> [T, D]. Ids outside the table take the nearest row."""
        table = self.embedding[...]
        if self.axis is None:
            return scaled(jnp.take(table, ids, axis=0, mode="clip"), self.scale)
        first = jax.lax.axis_index(self.axis) * table.shape[0]
        local = jnp.clip(ids, 0, self.vocab - 1) - first
        here = (local >= 0) & (local < table.shape[0])
        rows = jnp.take(table, local, axis=0, mode="clip")
        return scaled(jax.lax.psum(jnp.where(here[:, None], rows, 0), self.axis), self.scale)

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B, D] -> [B, V] float32."""
        table = self.embedding[...]
        logits = jnp.einsum("bd,vd->bv", x, table, preferred_element_type=jnp.float32)
        if self.axis is None:
            return logits
        return jax.lax.all_gather(logits, self.axis, axis=1, tiled=True)


class Linear(nnx.Module):
    """kernel [in, *out] (+ bias [*out]); how it is applied is up to `Ops`, which sees [in, out].

    out has several axes where a cut of the last one must go through each of several parts: [2, F]
    of a gated MLP. Where `make.quantization` is a scheme, the kernel is int8 or float8 and has a
    kernel_scale [*out] float32 beside it.
    """

    def __init__(self, size_in: int, size_out: tuple[int, ...], make: Make, *, bias: bool):
        kernel, scale = make.normal(size_in, *size_out), None
        if make.quantization is not None:
            values, steps = quantize(kernel[...], kernel_dtype(make.quantization))
            kernel, scale = nnx.Param(values), nnx.Param(steps)
        self.kernel, self.kernel_scale = kernel, scale
        self.bias = make.zeros(*size_out) if bias else None

    def read(
        self, stream: Residual, ops: Ops, norm: RMSNorm | None, act: str | None = None
    ) -> tuple[jax.Array, Residual]:
        """norm(stream) [T, in], or the stream itself -> [T, out], or [T, out / 2] with a gated
        activation; the stream. See `Ops.linear_in`."""
        return ops.linear_in(
            stream,
            self._kernel(),
            norm=None if norm is None else norm.weights(),
            eps=0.0 if norm is None else norm.eps,
            centred=norm is not None and norm.centred,
            bias=self._bias(),
            act=act,
            scale=self._scale(),
        )

    def write(
        self,
        y: jax.Array,
        ops: Ops,
        stream: Residual,
        norm: RMSNorm | None = None,
        factor: float = 1.0,
    ) -> Residual:
        """y [T, in] -> the stream [T, out] with it, or with factor * norm of it. See
        `Ops.linear_out`."""
        return ops.linear_out(
            y,
            self._kernel(),
            stream,
            bias=self._bias(),
            scale=self._scale(),
            norm=None if norm is None else norm.weights(),
            eps=0.0 if norm is None else norm.eps,
            factor=factor,
        )

    def _kernel(self) -> jax.Array:
        kernel = self.kernel[...]
        return kernel.reshape(kernel.shape[0], -1)

    def _bias(self) -> jax.Array | None:
        return None if self.bias is None else self.bias[...].reshape(-1)

    def _scale(self) -> jax.Array | None:
        return None if self.kernel_scale is None else self.kernel_scale[...].reshape(-1)


class RMSNorm(nnx.Module):
    """x / rms(x) * weights over the last axis."""

    centred: ClassVar[bool] = False
    """Of x without its mean."""

    def __init__(self, dim: int, make: Make, *, eps: float):
        self.scale = make.ones(dim)
        self.eps = eps

    def weights(self) -> jax.Array:
        """What normalized values are multiplied by, [dim]: the parameter, or what a family makes of
        it."""
        return self.scale[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weights(), self.eps, centred=self.centred)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / std(x) * weights over the last axis, without bias (Ba et al. 2016)."""

    centred = True


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, centred: bool = False) -> jax.Array:
    """x [..., n] / rms(x) * scale [n], in float32; x's dtype (Zhang and Sennrich 2019). centred: of
    x without its mean."""
    y = x.astype(jnp.float32)
    if centred:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Float32Norm(RMSNorm):
    """A norm whose weights are float32 whatever the model's dtype: Gemma's checkpoints hold what
    they differ from 1 by, and 1 more than that would lose bits in bfloat16."""

    def __init__(self, dim: int, make: Make, *, eps: float):
        super().__init__(dim, dataclasses.replace(make, dtype=jnp.dtype("float32")), eps=eps)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times factor, multiplied in float32; x's dtype."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class MLP(nnx.Module):
    """Gated MLP: (act(x @ gate) * (x @ up)) @ down, gate and up fused, [D, 2, F] (Shazeer 2020)."""

    out_norm_class: ClassVar[type[RMSNorm] | None] = None
    """Of a norm of what goes into the stream, where a family has one."""

    def __init__(self, config: ModelConfig, index: int, make: Make):
        """index: of the layer, for families whose layers differ."""
        del index
        activation(config.hidden_act)  # an unknown name fails here, not in the first step
        self.act = config.hidden_act
        dim, mlp_dim = config.hidden_size, config.intermediate_size // make.parts
        self.gate_up = Linear(dim, (2, mlp_dim), make, bias=config.mlp_bias)
        self.down = Linear(mlp_dim, (dim,), make, bias=config.mlp_bias)
        self.out_norm = stream_norm(self.out_norm_class, config, make)
        self.factor = config.residual_scale

    def __call__(self, stream: Residual, ops: Ops, norm: RMSNorm | None) -> Residual:
        """The stream [T, D] with mlp(norm(stream)) added."""
        y, stream = self.read(stream, ops, norm)
        return self.write(y, ops, stream)

    def read(self, stream: Residual, ops: Ops, norm: RMSNorm | None) -> tuple[jax.Array, Residual]:
        """The first half: [T, F], and the stream."""
        return self.gate_up.read(stream, ops, norm, act=self.act)

    def write(self, y: jax.Array, ops: Ops, stream: Residual) -> Residual:
        """The second half: the stream with what y [T, F] makes."""
        return self.down.write(y, ops, stream, self.out_norm, self.factor)


def stream_norm(cls: type[RMSNorm] | None, config: ModelConfig, make: Make) -> RMSNorm | None:
    """A norm of the stream's width."""
    return None if cls is None else cls(config.hidden_size, make, eps=config.rms_norm_eps)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function behind config.json's `hidden_act`; NotSupportedError for other names."""
    match name:
        case "silu" | "swish":
            return jax.nn.silu
        case "gelu":
            return lambda x: jax.nn.gelu(x, approximate=False)
        case "gelu_pytorch_tanh" | "gelu_new":
            return lambda x: jax.nn.gelu(x, approximate=True)
        case "quick_gelu":
            return lambda x: x * jax.nn.sigmoid(1.702 * x)
        case "relu":
            return jax.nn.relu
    raise NotSupportedError(
        f"hidden_act={quoted(name)} is not supported; supported: silu, gelu, gelu_pytorch_tanh, "
        "quick_gelu, relu"
    )
