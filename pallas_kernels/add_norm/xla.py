"""add_norm in plain XLA: the CPU engine's path, and the fallback."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm import rms_norm


def add_norm(
    x: jax.Array, y: jax.Array, norm: jax.Array, *, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """See pallas_kernels.add_norm."""
    total = (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)
    return total, rms_norm(total, norm, eps)
