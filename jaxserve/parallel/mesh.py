"""The devices of an engine as a mesh, and the shardings made from it.

An engine's mesh is [data, tensor]: a row is a replica, the devices of a row have parts of each
layer. What runs on a row (loop, runner, programs) is given a mesh of that row alone, [1, tensor].
All that it keeps, gives to a program or gets from one has a sharding of that mesh, so that a larger
one changes specs and not the code around them. Such a sharding costs a call nothing: a compiled
program takes the host as long with NamedSharding as with SingleDeviceSharding, 23 us with 31
arguments and 80 us with 311, donated and NumPy ones among them (CPU, jax 0.10.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxserve.errors import InvalidRequestError

DATA, TENSOR = "data", "tensor"
"""Axes: whole copies of a model, and the parts that each of its layers is cut into."""


def mesh_of(device: Any) -> Mesh:
    """The mesh [data 1, tensor 1] of one jax.Device."""
    return _mesh([[device]])


def numbered_mesh(devices: Sequence[Any], shape: tuple[int, int], base: int, step: int) -> Mesh:
    """The mesh of `shape` (dp_size, tp_size) of the jax.Devices base, base + step, ... of
    `devices`, replica by replica. InvalidRequestError: there are not so many."""
    (data, tensor), there = shape, len(devices)
    last = base + step * (data * tensor - 1)
    if last >= there:
        platform = devices[0].platform
        more = ""
        if platform == "cpu":
            more = " (XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of a CPU)"
        raise InvalidRequestError(
            f"dp_size={data} x tp_size={tensor} from base_gpu_id={base} with gpu_id_step={step} "
            f"takes devices up to number {last}, and JAX has {there} {platform} devices, numbers "
            f"0 to {there - 1}{more}"
        )
    chosen = devices[base : last + 1 : step]
    return _mesh([chosen[row * tensor : (row + 1) * tensor] for row in range(data)])


def given_mesh(mesh: Mesh) -> Mesh:
    """The option `mesh`, as engines have it. InvalidRequestError: an engine cannot run on it."""
    devices = list(mesh.devices.flat)
    here = jax.process_index()
    foreign = [device for device in devices if device.process_index != here]
    if foreign:
        raise InvalidRequestError(
            f"mesh has devices of other processes, the first is {foreign[0]}: an engine runs in one"
        )
    if len(set(devices)) < len(devices):
        twice = next(device for device in devices if devices.count(device) > 1)
        raise InvalidRequestError(f"mesh has the device {twice} more than once")
    kinds = sorted({f"{device.platform} {device.device_kind}" for device in devices})
    if len(kinds) > 1:
        raise InvalidRequestError(f"mesh has devices of several kinds: {', '.join(kinds)}")
    return _mesh(mesh.devices.tolist())


def replicas(mesh: Mesh) -> list[Mesh]:
    """Each row of a mesh [data, tensor] as a mesh [1, tensor]: what one replica runs on."""
    return [_mesh([row]) for row in mesh.devices.tolist()]


def _mesh(devices: Sequence[Sequence[Any]]) -> Mesh:
    return Mesh(np.array(devices), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2)


def first_device(mesh: Mesh) -> Any:
    """The jax.Device whose kind and memory stand for all of the mesh."""
    return mesh.devices.flat[0]


def replicated(mesh: Mesh, memory_kind: str | None = None) -> NamedSharding:
    """Of what every device has a whole copy of. memory_kind: None is the devices' own memory,
    "pinned_host" the host's, as they copy from and to it by themselves."""
    return NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)


def moved(tree: Any, row: Mesh) -> Any:
    """A tree of arrays with NamedSharding, copied to the devices of `row`, cut as they are: from
    device to device."""

    def move(array: jax.Array) -> jax.Array:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        return jax.device_put(array, NamedSharding(row, sharding.spec))

    return jax.block_until_ready(jax.tree.map(move, tree))


def bytes_on_each(arrays: Iterable[jax.Array]) -> int:
    """Bytes of `arrays` on each device that they lie on."""
    shapes = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in arrays)
    return sum(math.prod(shape) * itemsize for shape, itemsize in shapes)


def abstract(tree: Any, sharding: Sharding) -> Any:
    """A tree of shapes (or arrays) as jax.ShapeDtypeStruct that lie by `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
