"""add_norm: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """One launch instead of XLA's two to four, which take 13-20 us a layer at B=256 (H100)."""
    del dtype
    return ("triton", "xla") if device.is_cuda else ("xla",)


OPERATION = Operation(
    name="add_norm",
    implementations=(
        Implementation("triton", "pallas_kernels.add_norm.triton", cuda_only),
        Implementation("xla", "pallas_kernels.add_norm.xla"),
    ),
    order=_order,
)


def add_norm(
    x: jax.Array,
    y: jax.Array,
    norm: jax.Array,
    *,
    eps: float = 1e-6,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x + y, and its RMSNorm.

    x, y [T, D] (bfloat16, float16 or float32): the residual stream and what a layer adds to it.
    norm [D]: scales (Zhang and Sennrich 2019). implementation: a name, or names in order of
    preference ("triton", "xla"); None is the default order of this device.

    Returns (total, normed), both [T, D] in x's dtype: total is the sum in float32, rounded; normed
    is total * rsqrt(mean(total^2) + eps) * norm in float32, rounded. Raises ValueError for
    arguments that do not fit together, NotImplementedError with every reason when no implementation
    can do the case.
    """
    checks.check_dtype("x", x)
    if x.ndim != 2 or y.shape != x.shape:
        raise ValueError(f"x {list(x.shape)}, y {list(y.shape)}: expected both to be [T, D]")
    checks.check_dtype("y", y, x)
    if norm.shape != x.shape[1:]:
        raise ValueError(f"norm {list(norm.shape)}: expected [{x.shape[1]}]")
    checks.check_dtype("norm", norm)
    return OPERATION(x, y, norm, eps=float(eps), implementation=implementation, dtype=x.dtype)
