"""Parameters on devices with memory of their own: each gets the rows of the files that are its own,
in the files' dtype, and transposes, casts or quantizes them itself.

What runs there are programs without communication, one per shape for all devices together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from converters import finite, quantize, shards
from converters.parts import Part, filled
from converters.shards import Shard, shards_of
from converters.sources import TensorSource
from jaxserve.models import quantization

_EACH = PartitionSpec("device")
"""Every device's own, one behind the other along the first axis."""


def fuse(
    source: TensorSource, parts: Sequence[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> tuple[jax.Array, jax.Array]:
    """(the parameter that `parts` make up, whether each device's part of it is finite), which the
    devices need not have found out yet."""
    pieces = shards_of(spec.shape, sharding)
    each = _staged(source, parts, pieces)
    dtype = np.dtype(spec.dtype)
    if parts[0].transpose or each.dtype != dtype:
        turn = parts[0].transpose
        each = _turned(each, mesh=_mesh(pieces), shape=pieces[0].shape, dtype=dtype, turn=turn)
    each = jax.block_until_ready(each)
    return _named(spec.shape, sharding, each), _finite(each, mesh=_mesh(pieces))


def quantized(
    source: TensorSource, parts: Sequence[Part], spec: jax.ShapeDtypeStruct, sharding: Sharding
) -> tuple[jax.Array, np.ndarray]:
    """The same as a kernel of spec's dtype, and its scale. The channels' largest weights meet on
    the host, where rows are cut."""
    pieces = shards_of(spec.shape, sharding)
    mesh, dtype = _mesh(pieces), np.dtype(spec.dtype)
    each = _staged(source, parts, pieces)
    found = np.split(np.asarray(_largest(each, mesh=mesh)), mesh.size)
    largest = np.zeros(spec.shape[1:], np.float32)
    columns = [tuple(slice(*bounds) for bounds in piece.bounds[1:]) for piece in pieces]
    firsts = np.cumsum([0, *(len(piece.devices) for piece in pieces)])
    for at, first in zip(columns, firsts, strict=False):
        largest[at] = np.maximum(largest[at], found[first].reshape(largest[at].shape))
    scale = quantization.step_of(largest, dtype, np)
    for part in parts:
        quantize.check_finite(part.name, part.bias().of(scale))
    steps = _spread(pieces, [scale[at].reshape(-1) for at in columns])
    each = _rounded(each, steps, mesh=mesh, shape=pieces[0].shape, dtype=dtype)
    return _named(spec.shape, sharding, jax.block_until_ready(each)), scale


def _staged(source: TensorSource, parts: Sequence[Part], pieces: Sequence[Shard]) -> jax.Array:
    """[devices * rows, ...], a part of the parameter as its rows lie in the files."""
    dtypes = {source.tensor(part.name).dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    arrays = [shards.aligned_empty(parts[0].turned(piece.shape), dtype) for piece in pieces]
    if filled(parts) is not None:
        for array in arrays:
            array.fill(0)
    for part in parts:
        targets = [part.turned_target(*pair) for pair in zip(pieces, arrays, strict=True)]
        shards.read(source.tensor(part.name), targets)
    return _spread(pieces, arrays)


def _spread(pieces: Sequence[Shard], arrays: Sequence[np.ndarray]) -> jax.Array:
    each = shards.on_each(pieces, arrays)
    rows, *others = each[0].shape
    sharding = NamedSharding(_mesh(pieces), _EACH)
    return jax.make_array_from_single_device_arrays((len(each) * rows, *others), sharding, each)


def _named(shape: tuple[int, ...], sharding: Sharding, each: jax.Array) -> jax.Array:
    """The same memory as the array of `shape` that it is."""
    parts = [shard.data for shard in each.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _mesh(pieces: Sequence[Shard]) -> Mesh:
    return Mesh(np.array([device for piece in pieces for device in piece.devices]), ("device",))


def _on_each(mesh: Mesh, function: Any, *arrays: jax.Array) -> jax.Array:
    return jax.shard_map(function, mesh=mesh, in_specs=_EACH, out_specs=_EACH)(*arrays)


@functools.partial(jax.jit, static_argnames=("mesh", "shape", "dtype", "turn"))
def _turned(
    each: jax.Array, *, mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype[Any], turn: bool
) -> jax.Array:
    def local(x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        return (x.T if turn else x).reshape(shape)

    return _on_each(mesh, local, each)


@functools.partial(jax.jit, static_argnames="mesh")
def _finite(each: jax.Array, *, mesh: Mesh) -> jax.Array:
    return _on_each(mesh, lambda x: finite.on_device(x)[None], each)


@functools.partial(jax.jit, static_argnames="mesh")
def _largest(each: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Of each row of [rows, in] the largest absolute value, NaN where one is not finite."""

    def local(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return jnp.where(jnp.isfinite(x).all(axis=1), jnp.abs(x).max(axis=1), jnp.nan)

    return _on_each(mesh, local, each)


@functools.partial(jax.jit, static_argnames=("mesh", "shape", "dtype"))
def _rounded(
    each: jax.Array,
    steps: jax.Array,
    *,
    mesh: Mesh,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> jax.Array:
    def local(x: jax.Array, step: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return quantization.round_to(x, step[:, None], dtype).T.reshape(shape)

    return _on_each(mesh, local, each, steps)
