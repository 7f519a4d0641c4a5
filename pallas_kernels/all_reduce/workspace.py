"""What the peer kernels keep on each device between their calls, and how they find each other's.

    boxes   [3 buffers, BLOCKS blocks, region bytes]   peers write into it, only the owner reads
    state   error word, and of each block: buffer of its next call, bytes of the last one
    comm    a row a device: addresses of everybody's boxes, of its own state, its rank, its patience

A block's part of the boxes is its own for ever, whatever the shapes of its calls: a call takes a
prefix of it. So programs with different grids need not know of each other, and what counts calls is
on the device. An empty word of the boxes is EMPTY, two NaNs that no arithmetic gives.

The addresses are data: an argument of every program, so that a compiled one fits every start.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MAX_RANKS = 8
BLOCKS = 128
"""Blocks of a grid at most: all of them must run at once."""
BUFFERS = 3
"""A peer may be one call ahead (it needs what this rank sends in a call to end that call), and a
call empties the buffer of the one before it."""
EMPTY = 0xFFFFFFFF

HEADERS_AT = 16
STATE_WORDS = HEADERS_AT // 4 + 2 * BLOCKS
"""int32: word 0 is a mask of the ranks that did not answer in time, 0 as long as all did."""

COMM_WORDS = 32
RANK_AT, STATE_AT, OWN_AT = 64, 72, 80
"""Bytes of a row of comm: addresses of all boxes from 0, (rank, patience in ms), own state and own
boxes."""
PATIENCE_SECONDS = 3.0
"""How long a kernel waits for a word before it gives up: longer than any peer's delay that is no
failure, short enough that a failure is known within seconds."""


def region(ranks: int) -> int:
    """Bytes of a block's part of one buffer."""
    return max(4, ranks - 1) << 14


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Of the devices along one axis of a mesh. Kept alive by whoever keeps this; its memory must
    never be donated or moved."""

    comm: jax.Array
    """[n, COMM_WORDS] int32, a row a device: what kernels are given to run."""
    quiet: jax.Array
    """As comm, of rank -1: with it kernels return at once, and their results are anything. For the
    first run of a program, which loads its code: a device that waited for another one meanwhile
    would wait for ever."""
    boxes: jax.Array
    """[n, bytes / 4] int32."""
    state: jax.Array
    """[n, STATE_WORDS] int32."""

    def missing(self) -> list[int]:
        """Of each rank, a mask of the ranks for which it waited in vain; zeros if all is well.
        Waits for what the devices have been given to do. After a failure the workspace is of no
        more use."""
        shards = sorted(self.state.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        # sliced anew each time: JAX would remember what it once copied of the array itself
        return [int(shard.data[0, 0]) for shard in shards]

    def missing_but(self, rank: int) -> jax.Array:
        """As comm, with `rank` not taking part: what a launch that never came looks like."""
        rows = np.array(self.comm)
        rows[rank, RANK_AT // 4] = -1
        return jax.device_put(rows, self.comm.sharding)


def make(mesh: Mesh, axis_name: str, patience: float = PATIENCE_SECONDS) -> Workspace:
    """A workspace of the devices of `mesh`, whose other axes have one device each. patience: in
    seconds. Raises ValueError for a mesh of one device, or of more than MAX_RANKS."""
    ranks = mesh.shape[axis_name]
    if mesh.size != ranks or not 2 <= ranks <= MAX_RANKS:
        raise ValueError(
            f"mesh={dict(mesh.shape)}: expected 2 to {MAX_RANKS} devices, all along {axis_name!r}"
        )
    by_device = NamedSharding(mesh, PartitionSpec(axis_name))
    words = BUFFERS * BLOCKS * region(ranks) // 4
    boxes = jnp.full((ranks, words), -1, jnp.int32, device=by_device)
    state = jnp.zeros((ranks, STATE_WORDS), jnp.int32, device=by_device)
    jax.block_until_ready((boxes, state))
    addresses = [_addresses(array, mesh) for array in (boxes, state)]
    comm, quiet = (
        jax.device_put(comm_rows(*addresses, patience=patience, running=running), by_device)
        for running in (True, False)
    )
    made = Workspace(comm, quiet, boxes, state)
    made.missing()  # what reads it is compiled, and loaded, while no kernel waits for a peer
    return made


def comm_rows(boxes: Any, states: Any, *, patience: float, running: bool = True) -> np.ndarray:
    """comm of ranks whose boxes and states lie at these addresses."""
    ranks = len(boxes)
    rows = np.zeros((ranks, COMM_WORDS), np.int32)
    for rank in range(ranks):
        rows[rank, : 2 * ranks] = np.array(boxes, np.uint64).view(np.int32)
        rows[rank, RANK_AT // 4 :][:2] = rank if running else -1, round(patience * 1e3)
        own = np.array([states[rank], boxes[rank]], np.uint64).view(np.int32)
        rows[rank, STATE_AT // 4 :][:4] = own
    return rows


def _addresses(array: jax.Array, mesh: Mesh) -> list[int]:
    """Of the shards on the devices of the mesh, in its order."""
    where = {s.device: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}
    return [where[device] for device in mesh.devices.flat]
