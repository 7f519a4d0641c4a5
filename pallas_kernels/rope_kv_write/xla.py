"""Head norms, rotary embedding and KV write in plain XLA: elementwise fusions, then the scatter of
kv_write, which is in place.

Except float8 pages on a CPU: XLA's CPU backend scatters into a float16 copy of them (jax 0.10.2 to
0.12.0), right but as slow as the cache is large.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_write import xla as kv_write_xla
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope_kv_write.pages import to_pages


def _norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    return x if scale is None else rms_norm(x, scale, eps)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [T, heads, H] by cos, sin [T, H/2] -> float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rope_kv_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    first_page: jax.Array,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See pallas_kernels.rope_kv_write."""
    kv_heads, head_dim = k_pages.shape[2:]
    tokens, group = qkv.shape[0], num_heads // kv_heads
    heads = qkv.reshape(tokens, kv_heads, group + 2, head_dim)
    q = heads[:, :, :group].reshape(tokens, num_heads, head_dim)
    k, v = heads[:, :, group], heads[:, :, group + 1]
    q = _rotate(_norm(q, q_norm, eps), cos, sin).astype(qkv.dtype)
    k = to_pages(_rotate(_norm(k, k_norm, eps), cos, sin), k_pages.dtype)
    v = to_pages(v, v_pages.dtype)
    slots = slots + first_page * k_pages.shape[1]
    return q, *kv_write_xla.kv_write(k_pages, v_pages, k, v, slots)
