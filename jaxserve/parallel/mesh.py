"""The devices of an engine as a mesh, and the shardings made from it.

One engine has one device so far, a mesh of 1 x 1. All that it keeps, gives to a program or gets
from one has a sharding of its mesh, so that a larger one changes specs and not the code around
them. Such a sharding costs a call nothing: a compiled program takes the host as long with
NamedSharding as with SingleDeviceSharding, 23 us with 31 arguments and 80 us with 311, donated and
NumPy ones among them (CPU, jax 0.10.2).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

DATA, TENSOR = "data", "tensor"
"""Axes: whole copies of a model, and the parts that each of its layers is cut into."""


def mesh_of(device: Any) -> Mesh:
    """The mesh [data 1, tensor 1] of one jax.Device."""
    return Mesh(np.array([[device]]), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2)


def first_device(mesh: Mesh) -> Any:
    """The jax.Device whose kind and memory stand for all of the mesh."""
    return mesh.devices.flat[0]


def replicated(mesh: Mesh, memory_kind: str | None = None) -> NamedSharding:
    """Of what every device has a whole copy of. memory_kind: None is the devices' own memory,
    "pinned_host" the host's, as they copy from and to it by themselves."""
    return NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)


def abstract(tree: Any, sharding: Sharding) -> Any:
    """A tree of shapes (or arrays) as jax.ShapeDtypeStruct that lie by `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
