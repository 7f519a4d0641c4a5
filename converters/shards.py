"""A parameter in pieces, as its sharding cuts it: each is read by itself and put where it belongs.

A tensor in a file and a piece of a parameter meet in a `Target`: which rows of the file go to which
rows of memory. So what is read at a time is a block of rows, and nobody needs the whole.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from converters.stored_array import Check, checked

_ALIGNMENT = 64
"""Bytes; XLA on CPU takes over host buffers aligned like this without a copy."""
_MAPPED = 1 << 16
"""Bytes."""

Bounds = tuple[tuple[int, int], ...]
"""From and to, of each axis."""
Runs = tuple[tuple[int, int, int, int], ...]
"""(first row in the file, first row of the target, how many, every how manieth of the file), in the
file's order."""


class Tensor(Protocol):
    """What a file holds: rows that can be read some at a time. Reading raises ModelLoadError."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of `blocks`."""
        ...

    def read_into(self, out: np.ndarray, first: int = 0, check: Check | None = None) -> None:
        """Rows from `first` on into `out`, which has any strides and float dtype. check: sees each
        block of rows as `out` gets it."""
        ...

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows, a few at a time; each block is gone when the next one is asked for."""
        ...


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of an array that some devices have, all the same."""

    bounds: Bounds
    """Of the array."""
    devices: tuple[Any, ...]
    """jax.Device."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)


@dataclasses.dataclass(frozen=True)
class Target:
    """Memory that a tensor of a file goes to, or some of its rows and columns."""

    view: np.ndarray
    """[rows, ...]."""
    runs: Runs
    """Which rows go where."""
    cut: Bounds
    """Of the tensor's axes behind the first, what goes there."""

    def as_it_lies(self, tensor: Tensor) -> bool:
        """Whether whole rows go here, those of a run one behind the other."""
        return self.cut == whole(tensor.shape[1:]) and all(step == 1 for *_, step in self.runs)

    def take(self, first: int, block: np.ndarray) -> None:
        """What of a block of the tensor's rows, which begins with row `first`, goes here."""
        block = block[(slice(None), *(slice(*bounds) for bounds in self.cut))]
        behind = first + len(block)
        for start, at, count, step in self.runs:
            begin = max(0, -((start - first) // step))
            end = min(count, -((start - behind) // step))
            if begin < end:
                here = start + begin * step - first
                self.view[at + begin : at + end] = block[here::step][: end - begin]


def whole(shape: tuple[int, ...]) -> Bounds:
    return tuple((0, size) for size in shape)


def shards_of(shape: tuple[int, ...], sharding: Sharding) -> list[Shard]:
    """The different parts of an array of `shape`, with the devices that have each."""
    devices: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = zip(index or (), shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in parts)
        devices.setdefault(bounds, []).append(device)
    return [Shard(bounds, tuple(found)) for bounds, found in devices.items()]


def same_rows(shard: Shard, view: np.ndarray) -> Target:
    """For a tensor that lies in the file as in the array."""
    start, stop = shard.bounds[0]
    return Target(view, ((start, 0, stop - start, 1),), shard.bounds[1:])


def read(tensor: Tensor, targets: Sequence[Target], check: Check | None = None) -> None:
    """Each row of the file is read once, but for those that several targets have as they lie."""
    cut = []
    for target in targets:
        if target.as_it_lies(tensor):
            for first, at, count, _ in target.runs:
                tensor.read_into(target.view[at : at + count], first, check)
        else:
            cut.append(target)
    if not cut:
        return
    first, dtype = 0, cut[0].view.dtype
    for block in tensor.blocks():
        block = checked(block, dtype, check)
        for target in cut:
            target.take(first, block)
        first += len(block)


def placed(
    shape: tuple[int, ...],
    sharding: Sharding,
    shards: Sequence[Shard],
    arrays: Sequence[np.ndarray],
) -> jax.Array:
    """The array of `shape` whose shards are `arrays`, where it belongs."""
    parts = on_each(shards, arrays, sharding.memory_kind)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def on_each(
    shards: Sequence[Shard], arrays: Sequence[np.ndarray], memory_kind: str | None = None
) -> list[jax.Array]:
    """`arrays` on the devices of their shards. CPU devices take over the memory itself; others get
    what several of them have from the first one, so that it crosses the bus once."""

    def put(array: np.ndarray | jax.Array, device: Any) -> jax.Array:
        return jax.device_put(array, SingleDeviceSharding(device, memory_kind=memory_kind))

    firsts = [put(array, shard.devices[0]) for shard, array in zip(shards, arrays, strict=True)]
    jax.block_until_ready(firsts)
    parts = []
    for shard, array, first in zip(shards, arrays, firsts, strict=True):
        origin = array if shard.devices[0].platform == "cpu" else first
        parts += [first, *(put(origin, device) for device in shard.devices[1:])]
    return jax.block_until_ready(parts)


def place(tensor: Tensor, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """`tensor`, which has spec's shape, on `sharding` in spec's dtype. Raises ModelLoadError where
    reading fails."""
    shards = shards_of(spec.shape, sharding)
    arrays = [aligned_empty(shard.shape, np.dtype(spec.dtype)) for shard in shards]
    read(tensor, [same_rows(*pair) for pair in zip(shards, arrays, strict=True)])
    return placed(spec.shape, sharding, shards, arrays)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized array whose memory JAX on CPU adopts instead of copying it. A large one is a
    mapping of its own, which is gone with it: of `malloc`'s memory holes would stay."""
    size = math.prod(shape) * dtype.itemsize
    if size >= _MAPPED:
        buffer = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        return buffer.view(dtype).reshape(shape)
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)
