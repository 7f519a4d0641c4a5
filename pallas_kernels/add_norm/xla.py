"""add_norm in plain XLA: the CPU engine's path, and the fallback."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def add_norm(
    x: jax.Array, y: jax.Array, norm: jax.Array, *, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """See pallas_kernels.add_norm."""
    total = (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, (wide * norm.astype(jnp.float32)).astype(x.dtype)
