"""Residual sum and RMSNorm in one launch, Pallas on the Triton backend.

Grid (ceil(T / rows),). A program keeps `rows` whole rows in registers, so everything is read and
written once:

    x, y [rows, D] --+--> total, rounded ----> total [rows, D]
                     |         |
                     |         v
                     |    sum of squares along the row (registers, then between the warps)
                     |         |
    norm [D] --------+--> total * rsqrt(...) * norm ----> normed [rows, D]

D is padded to a power of two and masked. A thread holds 8 to 16 numbers of a row: one or two loads
of 16 bytes in a 2-byte dtype.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.device import Device, current_device
from pallas_kernels.triton_ops import column, plt, row
from pallas_kernels.tuning import tuned

WIDEST = 16384
"""Numbers of a row: 64 registers of a thread with 8 warps."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: of a program, a power of two. num_warps: they share each row."""

    rows: int = 1
    num_warps: int = 4


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    width = pl.next_power_of_2(features["size"])
    base = Sizes(num_warps=min(max(width // 256, 1), 8))
    return dataclasses.replace(base, **tuned(device, "add_norm", "triton", features))


def _kernel(x_ref, y_ref, norm_ref, total_ref, normed_ref, *, rows, width, eps):
    tokens, size = x_ref.shape
    row_ids = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    columns = jnp.arange(width, dtype=jnp.int32)
    at = column(row_ids, width), row(columns, rows)
    mask = None
    if size != width:
        mask = at[1] < size
    if tokens % rows:
        inside = at[0] < tokens
        mask = inside if mask is None else mask & inside

    def load(ref):
        other = None if mask is None else 0.0
        return plt.load(ref.at[at], mask=mask, other=other).astype(jnp.float32)

    along = None if size == width else columns < size
    other = None if along is None else 0.0
    scale = plt.load(norm_ref.at[columns], mask=along, other=other).astype(jnp.float32)
    total = (load(x_ref) + load(y_ref)).astype(total_ref.dtype)
    plt.store(total_ref.at[at], total, mask=mask)
    wide = total.astype(jnp.float32)
    factor = lax.rsqrt(jnp.sum(wide * wide, axis=1) / size + eps)
    normed = wide * column(factor, width) * row(scale, rows)
    plt.store(normed_ref.at[at], normed.astype(normed_ref.dtype), mask=mask)


def add_norm(
    x: jax.Array,
    y: jax.Array,
    norm: jax.Array,
    *,
    eps: float = 1e-6,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See pallas_kernels.add_norm. interpret: run on any backend, slowly."""
    tokens, size = x.shape
    if tokens == 0:
        raise NotImplementedError("no tokens, so no programs to launch")
    width = pl.next_power_of_2(size)
    if width > WIDEST:
        raise NotImplementedError(f"rows of {size} numbers are wider than {WIDEST}")
    if sizes is None:
        features = {"tokens": tokens, "size": size, "itemsize": x.dtype.itemsize}
        sizes = default_sizes(current_device(), features)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = triton_call(
        functools.partial(_kernel, rows=sizes.rows, width=width, eps=eps),
        name="add_norm",
        grid=(pl.cdiv(tokens, sizes.rows),),
        out_shape=[out, out],
        num_warps=sizes.num_warps,
        num_stages=1,
        interpret=interpret,
    )(x, y, norm)
    return total, normed
