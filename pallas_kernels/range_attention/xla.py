"""range_attention in plain XLA: the CPU engine's path, and the fallback.

Letters: P patches, N heads, H head dim; B tiles of S patches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.softmax import NEG, TINY

_BLOCK = 512
"""Patches whose scores are in memory at once, and how many they are compared with at a time."""
_WINDOW = 128
"""Ranges of no more patches than that are compared as windows."""
_SCORES = 1 << 26
"""The most scores of tiles, of all heads, that are in memory at once: 256 MiB in float32."""


def range_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    *,
    most: int | None = None,
    scale: float,
) -> jax.Array:
    """See pallas_kernels.range_attention."""
    if starts is None or ends is None:
        return _tiles(q, k, v, scale)

    def each(of: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, starts, ends = of
        if most is not None and most <= _WINDOW:
            out = _near(q, k, v, starts, ends, most, scale)
        else:
            out = _ranges(q, k, v, starts, ends, scale)
        return jnp.where((ends > starts)[:, None, None], out, 0)

    arrays = (q, k, v, starts, ends)
    if len(q) == 1:
        return each(tuple(x[0] for x in arrays))[None]
    return lax.map(each, arrays)


def _ranges(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, ends: jax.Array, scale: float
) -> jax.Array:
    """q, k, v [P, N, H], starts, ends [P] -> [P, N, H].

    Softmax over blocks of keys, one after the other (Milakov and Gimelshein 2018); a block of
    queries reads only those between its first start and its last end.
    """
    patches, heads, dim = q.shape
    if patches <= _BLOCK:
        keys = jnp.arange(patches)
        visible = (keys >= starts[:, None]) & (keys < ends[:, None])
        return _dense(q, k, v, visible, scale)
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
            scores = jnp.where(visible, _scores(q, k[i], scale), NEG)
            new = jnp.maximum(most, scores.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0)
            kept = jnp.exp(most - new)
            added = _product("nqk,knh->nqh", weights.astype(v.dtype), v[i])
            return new, total * kept + weights.sum(axis=-1), out * kept[..., None] + added

        nothing = jnp.zeros((heads, _BLOCK), jnp.float32)
        carry = (nothing + NEG, nothing, jnp.zeros((heads, _BLOCK, dim), jnp.float32))
        first, last = starts.min() // _BLOCK, -(-ends.max() // _BLOCK)
        _, total, out = lax.fori_loop(first, last, add, carry)
        out = out / jnp.maximum(total, TINY)[..., None]
        return out.transpose(1, 0, 2).astype(q.dtype)

    return lax.map(block, (q, starts, ends)).reshape(-1, heads, dim)[:patches]


def _near(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, ends: jax.Array, most: int,
    scale: float,
) -> jax.Array:  # fmt: skip
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
    attend = jax.vmap(lambda q, k, v, visible: _dense(q, k, v, visible, scale))
    out = attend(q, with_neighbours(k), with_neighbours(v), visible)
    return out.reshape(-1, heads, dim)[:patches]


def _tiles(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """q, k, v [B, S, N, H] -> the same, each tile by itself and seeing all of it."""
    count, size, heads, dim = q.shape
    pieces = -(-size // _BLOCK)
    rows = -(-size // pieces)
    padded = jnp.pad(q, ((0, 0), (0, pieces * rows - size), (0, 0), (0, 0)))
    blocks = padded.reshape(count * pieces, rows, heads, dim)
    of = jnp.arange(count * pieces) // pieces

    def block(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, tile = each
        return _dense(q, k[tile], v[tile], None, scale)

    at_once = max(1, min(count * pieces, _SCORES // (heads * rows * size)))
    out = lax.map(block, (blocks, of), batch_size=at_once)
    return out.reshape(count, pieces * rows, heads, dim)[:, :size]


def _cut(x: jax.Array, blocks: int, fill: int = 0, block: int = _BLOCK) -> jax.Array:
    """[P, ...] -> [blocks, block, ...], padded with `fill`."""
    padding = ((0, blocks * block - x.shape[0]), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, padding, constant_values=fill).reshape(blocks, block, *x.shape[1:])


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with float32 sums, of float32 in true float32: a GPU would use TF32 otherwise."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """q [Q, N, H], k [K, N, H] -> [N, Q, K] float32, scaled."""
    return _product("qnh,knh->nqk", q, k) * scale


def _dense(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None, scale: float
) -> jax.Array:
    """q [Q, N, H], k, v [K, N, H], visible [Q, K] or everything -> [Q, N, H]."""
    scores = _scores(q, k, scale)
    if visible is not None:
        scores = jnp.where(visible, scores, NEG)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _product("nqk,knh->qnh", weights, v).astype(v.dtype)
