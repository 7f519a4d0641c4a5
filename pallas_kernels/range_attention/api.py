"""range_attention: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """XLA keeps a block's scores in memory: of 5,476 patches and 16 heads that is 1.9 GB of them
    written and read twice a layer, 2 ms at an H100's bandwidth; the kernel keeps them in
    registers, and takes 0.51 ms (head dim 80; 42% of what products alone take)."""
    del dtype
    return ("triton", "xla") if device.is_cuda else ("xla",)


OPERATION = Operation(
    name="range_attention",
    implementations=(
        Implementation("triton", "pallas_kernels.range_attention.triton", cuda_only),
        Implementation("xla", "pallas_kernels.range_attention.xla"),
    ),
    order=_order,
)


def range_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    *,
    most: int | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Attention within ranges, not causal: of a vision tower's patches.

    q, k, v [B, S, N, H] of one dtype (bfloat16, float16 or float32): B times S patches, all finite,
    those that nobody sees included. Patch i sees the patches j of the same S with
    starts[i] <= j < ends[i]. starts, ends [B, S] int32, within 0 to S: ranges of neighbours that
    are equal, or close, cost the least, since a block of patches reads from the first start to the
    last end of all in it. None (both): every patch sees all S, as those of a tile do.
    most: no range has more patches, and each patch that sees any is in its own range (windows);
    None says nothing about them.
    scale: of the scores before softmax, positive, H**-0.5 by default.
    implementation: a name, or names in order of preference ("triton", "xla"); None is the default
    order of this device.

    Returns [B, S, N, H] in q's dtype; zeros for a patch whose range is empty. Scores, softmax and
    sums are float32, and scores of all patches with all are never in memory at once, unless they
    are few. Raises ValueError for arguments that do not fit together, NotImplementedError with
    every reason when no implementation can do the case. After FlashAttention-2 (Dao, 2023).
    """
    checks.check_dtype("q", q)
    if q.ndim != 4 or not q.size:
        raise ValueError(
            f"q {list(q.shape)}: expected [times, patches, heads, head dim], not empty"
        )
    for name, array in (("k", k), ("v", v)):
        if array.shape != q.shape:
            raise ValueError(f"{name} {list(array.shape)}: expected {list(q.shape)}, as q is")
        checks.check_dtype(name, array, q)
    if (starts is None) != (ends is None):
        raise ValueError("starts and ends: expected both or neither")
    if starts is None and most is not None:
        raise ValueError(f"most={most}: expected None without starts and ends")
    if most is not None and most < 1:
        raise ValueError(f"most={most}: expected None or at least 1")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale}: expected None or a positive number")
    for name, array in (("starts", starts), ("ends", ends)):
        if array is not None:
            checks.check_int32(name, array, q.shape[:2])
    return OPERATION(
        q,
        k,
        v,
        starts,
        ends,
        most=most,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        implementation=implementation,
        dtype=q.dtype,
    )
