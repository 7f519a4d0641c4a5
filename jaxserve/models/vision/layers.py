"""What towers are made of. Activations keep x's dtype; norms and softmax are float32.

Letters: P patches, N heads, H head dim, d the tower's model dim, f its mlp dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.dense import product
from jaxserve.models.layers import RMSNorm, activation
from jaxserve.models.make import Make
from jaxserve.models.vision.attention import Attend

Norm = Callable[[jax.Array], jax.Array]


def padded(mlp_dim: int) -> int:
    """F as a layer's MLP has it: a multiple of 128, of which GPUs multiply matrices faster (3,420
    is none of 8). What is more than a checkpoint has is zero, and so adds nothing."""
    return -(-mlp_dim // 128) * 128


class Linear(nnx.Module):
    """kernel [in, out] and, in most, bias [out]."""

    def __init__(self, size_in: int, size_out: int, make: Make, *, bias: bool = True):
        self.kernel = make.normal(size_in, size_out)
        self.bias = make.zeros(size_out) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias[...]
        return product(x, self.kernel[...], bias, None).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis (Ba et al. 2016)."""

    def __init__(self, dim: int, make: Make, *, eps: float):
        self.scale, self.bias, self.eps = make.ones(dim), make.zeros(dim), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (y * scale + bias).astype(x.dtype)


class Attention(nnx.Module):
    """Every patch sees what `attend` lets it see; q, k and v in one product, each of N heads."""

    def __init__(self, dim: int, heads: int, make: Make):
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, make)
        self.o = Linear(dim, dim, make)

    def __call__(
        self, x: jax.Array, attend: Attend, turn: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """x [..., P, d] -> [..., P, d]. turn: what q and k [..., P, N, H] are rotated by."""
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.heads, -1)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        if turn is not None:
            q, k = turn(q), turn(k)
        return self.o(attend(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """act(x @ fc1) @ fc2."""

    def __init__(self, size_in: int, size: int, size_out: int, make: Make, *, act: str, bias=True):
        self.act = act
        activation(act)  # an unknown name fails here, not in the first run
        self.fc1 = Linear(size_in, size, make, bias=bias)
        self.fc2 = Linear(size, size_out, make, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        return self.fc2(activation(self.act)(self.fc1(x)))


class GatedMLP(nnx.Module):
    """(act(x @ gate) * (x @ up)) @ down, gate and up side by side."""

    def __init__(self, dim: int, size: int, make: Make, *, act: str):
        self.act = act
        activation(act)
        self.gate_up = Linear(dim, 2 * size, make)
        self.down = Linear(size, dim, make)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d] -> [..., d]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(activation(self.act)(gate) * up)


class Layer(nnx.Module):
    """Pre-norm residual block."""

    def __init__(
        self,
        norms: tuple[LayerNorm | RMSNorm, LayerNorm | RMSNorm],
        attention: Attention,
        mlp: MLP | GatedMLP,
    ):
        """norms: before attention and before the MLP."""
        self.norm1, self.norm2 = norms
        self.attn, self.mlp = attention, mlp

    def __call__(
        self, x: jax.Array, attend: Attend, turn: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """x [..., P, d] -> [..., P, d]."""
        x = x + self.attn(self.norm1(x), attend, turn)
        return x + self.mlp(self.norm2(x))
