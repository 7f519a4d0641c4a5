"""linear in plain XLA: the CPU engine's path, prefill everywhere, and the fallback.

x --norm in float32, rounded--> [M, K] x w (either layout, no copy) --> [M, N] in x's dtype
  --scale, bias, activation, residual in float32--> rounded

The product is rounded, unlike in the Triton kernel: a float32 result of a prefill step's gate and
up would be a gigabyte, written and read again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear import activations
from pallas_kernels.rms_norm import rms_norm


def linear(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    act: str | None = None,
    transposed: bool = False,
) -> jax.Array:
    """See pallas_kernels.linear."""
    dtype = x.dtype
    if norm is not None:
        x = rms_norm(x, norm, eps)
    out = lax.dot_general(
        x,
        w.astype(dtype),
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    ).astype(jnp.float32)
    if scale is not None:
        out = out * scale
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    if act is not None:
        gate, up = jnp.split(out, 2, axis=-1)
        out = activations.apply(act, gate) * up
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    return out.astype(dtype)
