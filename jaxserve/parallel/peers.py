"""How the GPUs of one mesh sum: by kernels over peer memory, or by XLA's collective alone.

Decided once at start, by trying: a kernel that writes into another GPU's memory needs peer access,
memory that JAX's allocator maps for peers, and wires faster than the launch of a collective.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.parallel import access
from jaxserve.parallel.mesh import TENSOR, first_device
from pallas_kernels import available_implementations, current_device
from pallas_kernels.all_reduce import workspace
from pallas_kernels.all_reduce.probe import Probe, probe

logger = logging.getLogger(__name__)
SELF_TEST_SECONDS = 120.0
"""Of the self-test at most, three programs' compilation included."""
T = TypeVar("T")


class PeersError(RuntimeError):
    """A device has given up waiting for another one: nothing that they compute now is right."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """What the devices of a mesh that split a model know of each other."""

    form: Literal["peer", "psum", "none"]
    """"peer": kernels over peer memory, and `psum` for what is too large for them; "psum": that
    alone; "none": there is one device."""
    reason: str
    """Why, with the times that were measured."""
    memory: workspace.Workspace | None = None
    """Of "peer". It must live as long as any program that is given its addresses runs."""

    @property
    def comm(self) -> jax.Array | None:
        """[n, COMM_WORDS] int32, sharded over "tensor": an argument of every program that sums, as
        `comm` of `pallas_kernels.all_reduce`; None takes the XLA form."""
        return self.memory.comm if self.memory else None

    @property
    def quiet(self) -> jax.Array | None:
        """In place of `comm` at the first run of a program on its devices, which loads its code.
        The results of that run are anything."""
        return self.memory.quiet if self.memory else None

    def error(self) -> str | None:
        """What went wrong between the devices, if anything: then no later result is right, and the
        workspace is of no more use. Waits for what the devices have been given to do. A kernel
        gives up after `workspace.PATIENCE_SECONDS`, so there is no need to ask after a step that
        took less."""
        masks = self.memory.missing() if self.memory else []
        waits = []
        for rank, mask in enumerate(masks):
            others = [str(other) for other in range(len(masks)) if mask >> other & 1]
            if others:
                waits.append(f"rank {rank} waited for {', '.join(others)}")
        if not waits:
            return None
        return (
            f"an all-reduce was given up after {workspace.PATIENCE_SECONDS:g} s: {'; '.join(waits)}"
        )


def connect(mesh: Mesh, size: int, dtype: Any, *, seconds: float = SELF_TEST_SECONDS) -> Peers:
    """Peers of a mesh [data 1, tensor n] for sums of [B, size] in `dtype`. Runs the self-test where
    the devices might do without `psum`, for `seconds` at most: after that, or if it fails, they are
    not tried again. Must not run beside programs of these devices."""
    if mesh.shape[TENSOR] == 1:
        return Peers("none", "one device")
    # NCCL's own kernels must leave multicast alone too; it reads this when a mesh is first used.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    reason = unfit(mesh, size, dtype)
    if reason is None:
        peers = within(seconds, lambda: _tried(mesh, size, dtype))
        logger.info("all-reduce over %s: %s", dict(mesh.shape), peers.reason)
        return peers
    return Peers("psum", reason)


def unfit(mesh: Mesh, size: int, dtype: Any) -> str | None:
    """Why the peer kernels are not even tried, or None."""
    ranks, device = mesh.shape[TENSOR], first_device(mesh)
    if device.platform != "gpu":
        return f"{device.platform} devices have no peer memory"
    if any(other.process_index != jax.process_index() for other in mesh.devices.flat):
        return "the devices belong to several processes"
    if "mosaic_one_shot" not in available_implementations("all_reduce", dtype):
        kind = current_device().kind
        return f"the kernels are for Hopper GPUs and 16 bits, not {kind}, {jnp.dtype(dtype).name}"
    # Pallas takes half a second to import, and most engines never get here.
    from pallas_kernels.all_reduce import mosaic_one_shot

    try:
        mosaic_one_shot.plan(1, size, ranks, dtype)
    except NotImplementedError as refused:
        return str(refused)
    return access.refusal([other.local_hardware_id for other in mesh.devices.flat])


def within(seconds: float, trial: Callable[[], Peers]) -> Peers:
    """What `trial` returns, or why there is nothing: it raised, or took longer. It runs on a daemon
    thread, which is left behind then."""
    found: list[Peers] = []

    def run() -> None:
        try:
            found.append(trial())
        except Exception as error:
            logger.warning("the self-test of the peer kernels failed", exc_info=True)
            found.append(Peers("psum", f"the self-test failed: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name="jaxserve-self-test", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Peers("psum", f"the self-test took more than {seconds:g} s")


def _tried(mesh: Mesh, size: int, dtype: Any) -> Peers:
    memory = workspace.make(mesh, TENSOR)
    found = probe(mesh, TENSOR, memory, size, dtype)
    return judged(found, Peers("peer", "", memory))


def judged(found: Probe, peers: Peers) -> Peers:
    """`peers` with its reason if the self-test `found` speaks for them, else "psum" with that."""
    if error := peers.error():
        return Peers("psum", f"the self-test failed: {error}")
    if found.wrong:
        return Peers("psum", f"the self-test failed: {found.wrong} numbers of sums were wrong")
    times = f"{found.peer_us:.1f} us over peer memory, {found.xla_us:.1f} us with psum"
    if found.peer_us > found.xla_us:
        return Peers("psum", times)
    return dataclasses.replace(peers, reason=times)
