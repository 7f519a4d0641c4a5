"""kv_write: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """XLA's scatter everywhere: in place when donated, and no slower than a kernel (H100,
    2026-11-23)."""
    del dtype
    return ("xla", "triton") if device.is_cuda else ("xla",)


OPERATION = Operation(
    name="kv_write",
    implementations=(
        Implementation("xla", "pallas_kernels.kv_write.xla"),
        Implementation("triton", "pallas_kernels.kv_write.triton", cuda_only),
    ),
    order=_order,
)


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Store the keys and values of T tokens in the cache; in place when the pages are donated.

    k_pages, v_pages [P, S, K, H]; k, v [T, K, H] of the same dtype (bfloat16, float16 or float32).
    slots [T] int32: positions in the flat P * S; those at P * S or above are dropped, so padding
    goes there; the others must differ from each other and not be negative. implementation: a name,
    or names in order of preference ("xla", "triton"); None is the default order of this device.

    Returns the new (k_pages, v_pages). Raises ValueError for arguments that do not fit together,
    NotImplementedError with every reason when no implementation can do the case.
    """
    checks.check_pages(k_pages, v_pages)
    expected = (slots.shape[0], *k_pages.shape[2:])
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(f"{name} {list(array.shape)}: expected {list(expected)}")
        checks.check_dtype(name, array, k_pages)
    checks.check_int32("slots", slots, (slots.shape[0],))
    return OPERATION(
        k_pages, v_pages, k, v, slots, implementation=implementation, dtype=k_pages.dtype
    )
