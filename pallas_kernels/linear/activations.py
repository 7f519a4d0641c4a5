"""Activations of a gated MLP, in float32. The names are those of config.json's `hidden_act`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


def apply(name: str, x: jax.Array) -> jax.Array:
    """What XLA computes."""
    if name == "silu":
        return jax.nn.silu(x)
    if name == "relu":
        return jax.nn.relu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_pytorch_tanh")


def apply_in_kernel(name: str, x: jax.Array) -> jax.Array:
    """The same from exp alone: Pallas-Triton lowers no erf, and tanh is a sigmoid."""
    if name == "silu":
        return x * _sigmoid(x)
    if name == "relu":
        return jnp.maximum(x, 0.0)
    if name == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u)
        return x * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1.0 + _erf(x * math.sqrt(0.5)))


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _erf(x: jax.Array) -> jax.Array:
    """Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7."""
    size = jnp.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    inside = 1.0 - series * jnp.exp(-size * size)
    return jnp.where(x < 0.0, -inside, inside)
