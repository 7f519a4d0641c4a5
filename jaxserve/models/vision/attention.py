"""Attention of patches: not causal, and no further than a patch's own picture or window.

What a patch sees are the patches from its `start` up to, not including, its `end`. Scores of all
patches with all are never in memory at once, unless they are few. Softmax is float32, and a row
that sees nothing is not NaN.

Letters: P patches, N heads, H head dim; B tiles of S patches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 512
"""Patches whose scores are in memory at once, and how many they are compared with at a time."""
_SCORES = 1 << 26
"""The most scores, of all heads, that are in memory at once: 256 MiB in float32."""
_NEVER = -1e30
"""A score that is not seen: finite, so that a row without any other stays finite."""


def ranges(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, ends: jax.Array
) -> jax.Array:
    """q, k, v [P, N, H], starts, ends [P] int32 -> [P, N, H]. Patches with one range lie together.

    Softmax over blocks of keys, one after the other (Milakov and Gimelshein 2018); a block of
    queries reads only those between its first start and its last end.
    """
    patches, heads, dim = q.shape
    if patches <= _BLOCK:
        keys = jnp.arange(patches)
        visible = (keys >= starts[:, None]) & (keys < ends[:, None])
        return _dense(q, k, v, visible)
    blocks = -(-patches // _BLOCK)
    q, k, v = (_cut(x, blocks) for x in (q, k, v))
    starts = _cut(starts, blocks, patches)
    ends = _cut(ends, blocks)

    def block(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, starts, ends = of

        def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most, total, out = carry  # [N, Q], [N, Q], [N, Q, H]
            keys = i * _BLOCK + jnp.arange(_BLOCK)
            visible = (keys >= starts[:, None]) & (keys < ends[:, None])
            scores = jnp.where(visible, _scores(q, k[i]), _NEVER)
            new = jnp.maximum(most, scores.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0)
            kept = jnp.exp(most - new)
            out = out * kept[..., None] + jnp.einsum(
                "nqk,knh->nqh",
                weights.astype(v.dtype),
                v[i],
                preferred_element_type=jnp.float32,
            )
            return new, total * kept + weights.sum(axis=-1), out

        nothing = jnp.zeros((heads, _BLOCK), jnp.float32)
        carry = (nothing + _NEVER, nothing, jnp.zeros((heads, _BLOCK, dim), jnp.float32))
        first, last = starts.min() // _BLOCK, -(-ends.max() // _BLOCK)
        _, total, out = jax.lax.fori_loop(first, last, add, carry)
        out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
        return out.transpose(1, 0, 2).astype(q.dtype)

    return jax.lax.map(block, (q, starts, ends)).reshape(-1, heads, dim)[:patches]


def near(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, ends: jax.Array, most: int
) -> jax.Array:
    """The same where no range has more than `most` patches, the own one among them: a block of so
    many queries is compared with itself and its two neighbours."""
    patches, heads, dim = q.shape
    blocks = -(-patches // most)
    q, k, v = (_cut(x, blocks, block=most) for x in (q, k, v))
    starts, ends = (_cut(x, blocks, block=most) for x in (starts, ends))

    def with_neighbours(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((1, 1), *((0, 0),) * 3))
        return jnp.concatenate([padded[:-2], x, padded[2:]], axis=1)

    keys = (jnp.arange(blocks)[:, None] - 1) * most + jnp.arange(3 * most)
    visible = (keys[:, None] >= starts[..., None]) & (keys[:, None] < ends[..., None])
    attend = jax.vmap(_dense)
    out = attend(q, with_neighbours(k), with_neighbours(v), visible)
    return out.reshape(-1, heads, dim)[:patches]


def tiles(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q, k, v [B, S, N, H] -> the same, each tile by itself and seeing all of it."""
    count, size, heads, dim = q.shape
    pieces = -(-size // _BLOCK)
    rows = -(-size // pieces)
    padded = jnp.pad(q, ((0, 0), (0, pieces * rows - size), (0, 0), (0, 0)))
    blocks = padded.reshape(count * pieces, rows, heads, dim)
    of = jnp.arange(count * pieces) // pieces

    def block(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, tile = each
        return _dense(q, k[tile], v[tile], None)

    at_once = max(1, min(count * pieces, _SCORES // (heads * rows * size)))
    out = jax.lax.map(block, (blocks, of), batch_size=at_once)
    return out.reshape(count, pieces * rows, heads, dim)[:, :size]


def _cut(x: jax.Array, blocks: int, fill: int = 0, block: int = _BLOCK) -> jax.Array:
    """[P, ...] -> [blocks, block, ...], padded with `fill`."""
    padding = ((0, blocks * block - x.shape[0]), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, padding, constant_values=fill).reshape(blocks, block, *x.shape[1:])


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [Q, N, H], k [K, N, H] -> [N, Q, K] float32, divided by sqrt(H)."""
    scores = jnp.einsum("qnh,knh->nqk", q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None) -> jax.Array:
    """q [Q, N, H], k, v [K, N, H], visible [Q, K] or everything -> [Q, N, H]."""
    scores = _scores(q, k)
    if visible is not None:
        scores = jnp.where(visible, scores, _NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("nqk,knh->qnh", weights, v)
