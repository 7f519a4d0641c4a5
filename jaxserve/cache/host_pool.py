"""The host memory of evicted pages: pinned, so that the device copies from and to it by itself."""

from __future__ import annotations

from collections import deque

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import InvalidRequestError
from jaxserve.memory import available_host_memory
from jaxserve.parallel.mesh import TENSOR

BLOCK = PartitionSpec(None, None, None, None, TENSOR)
"""How a block is cut over devices: as pages are."""
BLOCK_BYTES = 32 << 20
MOST_PAGES = 16
"""A block: what one copy moves. Smaller ones cost more calls, larger ones more memory when they are
not full."""
COPYING_BYTES = 256 << 20
"""Copies that may be under way in each direction: they take device memory."""
SPARED_BYTES = 4 << 30
"""Host memory that the tier leaves to everybody else."""
SLACK_BYTES = 2 << 30
"""What JAX may pin beside a pool of a known size, for transfers."""


def pinned_limit(size: int) -> int:
    """Bytes that JAX must be allowed to pin for a pool of `size` bytes (0: not known yet)."""
    free = max(available_host_memory() - SPARED_BYTES, 0)
    return min(size + SLACK_BYTES, free) if size else free


def pages_per_block(page_bytes: int, num_pages: int) -> int:
    """Pages of `page_bytes` (all layers, K and V) that one copy moves. As many are evicted at once,
    so of a small pool it is a small part."""
    return max(min(BLOCK_BYTES // page_bytes, MOST_PAGES, num_pages // 16), 1)


class HostPool:
    """Blocks [2, L, C, S, K, H] (K and V, layers, pages of a block) in the memory space
    "pinned_host" of `mesh`. Not thread-safe: the engine thread calls it."""

    def __init__(
        self, mesh: Mesh, shape: tuple[int, ...], dtype: jnp.dtype, num_bytes: int, asked: str
    ):
        """shape: of a block. num_bytes: of the whole pool. asked: the option and its value.
        InvalidRequestError: it is less than a block, or more than the machine has."""
        self._device = NamedSharding(mesh, BLOCK)
        self._host = NamedSharding(mesh, BLOCK, memory_kind="pinned_host")
        self._copying: deque[jax.Array] = deque()
        self.block_bytes = jax.ShapeDtypeStruct(shape, dtype).size * dtype.itemsize
        self.num_blocks = num_bytes // self.block_bytes
        self.width = shape[2]
        if not self.num_blocks:
            raise InvalidRequestError(
                f"{asked} is {num_bytes} bytes of host memory, less than a block of {self.width} "
                f"pages ({self.block_bytes} bytes)"
            )
        gib = 2.0**30
        free = available_host_memory() - SPARED_BYTES
        if num_bytes > free:
            raise InvalidRequestError(
                f"{asked} wants {num_bytes / gib:.1f} GiB of host memory; {max(free, 0) / gib:.1f} "
                "GiB are there to give"
            )
        try:
            empty = jnp.zeros(shape, dtype, device=self._device)
            self._blocks = [jax.device_put(empty, self._host) for _ in range(self.num_blocks)]
            jax.block_until_ready(self._blocks)
        except Exception as error:
            raise InvalidRequestError(
                f"{asked} wants {num_bytes / gib:.1f} GiB of pinned memory, more than JAX gets "
                "(XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, read when it starts, may be less): "
                f"{error}"
            ) from error

    @property
    def nbytes(self) -> int:
        """Of host memory."""
        return self.num_blocks * self.block_bytes

    def store(self, block: int, content: jax.Array) -> None:
        """Begin to copy `content`, of a block's shape and on the device, into block number `block`.
        Waits for earlier copies while too many are under way."""
        while len(self._copying) * self.block_bytes >= COPYING_BYTES:
            self._copying.popleft().block_until_ready()
        self._blocks[block] = jax.device_put(content, self._host)
        self._copying.append(self._blocks[block])

    def load(self, block: int) -> jax.Array:
        """Block number `block`, on its way to the device."""
        return jax.device_put(self._blocks[block], self._device)

    def reset(self) -> None:
        """Forget copies under way: they may have failed, and wait for nothing. What blocks hold is
        not to be read before it is stored anew."""
        self._copying.clear()

    def close(self) -> None:
        """Free the memory."""
        self._copying.clear()
        self._blocks.clear()
