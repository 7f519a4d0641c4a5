"""all_reduce: the public functions and the default order."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.all_reduce.workspace import COMM_WORDS
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, sm90_only


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """Over peer memory in one step 3.4 us for [1, 4096] and 9.2 for [256, 4096], where NCCL through
    XLA takes 20 and 23 (2 H100, jax 0.11.2, 2026-11-27); each form leaves what it is not for to the
    next."""
    if device.is_cuda and device.capability[0] == 9 and dtype.itemsize == 2:
        return ("mosaic_one_shot", "mosaic_two_shot", "xla")
    return ("xla",)


OPERATION = Operation(
    name="all_reduce",
    implementations=(
        Implementation("mosaic_one_shot", "pallas_kernels.all_reduce.mosaic_one_shot", sm90_only),
        Implementation("mosaic_two_shot", "pallas_kernels.all_reduce.mosaic_two_shot", sm90_only),
        Implementation("xla", "pallas_kernels.all_reduce.xla"),
    ),
    order=_order,
)


def all_reduce(
    x: jax.Array,
    comm: jax.Array | None,
    *,
    axis_name: str = "tensor",
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """The sum of x over the devices along a mesh axis. Called inside `jax.shard_map`.

    x [B, D] (bfloat16, float16 or float32): each device's part of the sum. comm [1, COMM_WORDS]
    int32: this device's row of `Workspace.comm`; None where there is no workspace, which leaves the
    XLA form. implementation: a name, or names in order of preference ("mosaic_one_shot",
    "mosaic_two_shot", "xla"); None is the default order of this device.

    Returns [B, D] in x's dtype, bitwise the same on every device; the peer kernels sum in float32,
    in the order of ranks, and round once. Calls of one program that take the same comm must depend
    on each other, and every device must get the same calls in the same order. Raises ValueError for
    arguments that do not fit together, NotImplementedError with every reason when no implementation
    can do the case.
    """
    _check(x, comm)
    return OPERATION(
        x,
        comm,
        None,
        None,
        eps=0.0,
        axis_name=axis_name,
        implementation=implementation,
        dtype=x.dtype,
    )


def all_reduce_add_norm(
    x: jax.Array,
    residual: jax.Array,
    norm: jax.Array,
    comm: jax.Array | None,
    *,
    eps: float = 1e-6,
    axis_name: str = "tensor",
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """residual + the sum of x over the devices along a mesh axis, and the RMSNorm of that: what
    `add_norm` is to one device.

    x [B, D], comm, axis_name, implementation: as in `all_reduce`. residual [B, D] in x's dtype and
    norm [D] (bfloat16, float16 or float32): the same on every device.

    Returns (total, normed), both [B, D] in x's dtype, as `add_norm` does. The one-shot kernel
    rounds the total once; the other forms round the sum over the devices before they add the
    residual. Raises what `all_reduce` raises.
    """
    _check(x, comm)
    if residual.shape != x.shape:
        raise ValueError(f"residual {list(residual.shape)}: expected {list(x.shape)}, as x has")
    checks.check_dtype("residual", residual, x)
    if norm.shape != x.shape[1:]:
        raise ValueError(f"norm {list(norm.shape)}: expected [{x.shape[1]}]")
    checks.check_dtype("norm", norm)
    return OPERATION(
        x,
        comm,
        residual,
        norm,
        eps=float(eps),
        axis_name=axis_name,
        implementation=implementation,
        dtype=x.dtype,
    )


def _check(x: jax.Array, comm: jax.Array | None) -> None:
    checks.check_dtype("x", x)
    if x.ndim != 2:
        raise ValueError(f"x {list(x.shape)}: expected [B, D]")
    if comm is not None:
        checks.check_int32("comm", comm, (1, COMM_WORDS))
