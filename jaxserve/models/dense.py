"""Causal attention over whole sequences, without a cache: for training, export and tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def dense_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Any,
    meta: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> tuple[jax.Array, Any]:
    """The `Attend` of a model that sees all its tokens at once.

    q [T, N, H], k and v [T, K, H]; softmax in float32, memory O(N T^2). meta: segment of each
    token, [T] int32, for sequences packed side by side; None is one sequence. `cache` passes
    through. Returns out [T, N, H].
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("tkgh,skh->kgts", grouped, k, preferred_element_type=jnp.float32)
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if meta is not None:
        visible &= meta[:, None] == meta
    weights = jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skh->tkgh", weights.astype(v.dtype), v)
    return out.reshape(q.shape), cache
