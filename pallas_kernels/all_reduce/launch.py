"""A peer kernel's text as a Pallas kernel on the Mosaic GPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.all_reduce.plan import Plan, Sizes
from pallas_kernels.mosaic_ops import plgpu
from pallas_kernels.ptx import asm, global_address, shared_address


def launch(
    plan: Callable[..., Plan],
    text: Callable[[Plan, bool | None, float], str],
    x: jax.Array,
    comm: jax.Array | None,
    residual: jax.Array | None,
    norm: jax.Array | None,
    *,
    eps: float,
    axis_name: str,
    sizes: Sizes | None,
) -> Any:
    """The kernel `text(plan, wide, eps)`, whose operands are x, comm and the sum, or x, comm,
    residual, norm, the total, the normed total, and shared memory of [slots, 32] float32."""
    if comm is None:
        raise NotImplementedError("comm is None: the devices have no workspaces of each other")
    rows, size = x.shape
    found = plan(rows, size, lax.axis_size(axis_name), x.dtype, sizes)
    fused = norm is not None
    written = text(found, norm.dtype == np.float32 if fused else None, eps)
    operands = 6 if fused else 3

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(ctx: Any, *refs: Any) -> None:
            del ctx
            addresses = [global_address(ref) for ref in refs[:operands]]
            addresses += [shared_address(ref) for ref in refs[operands:]]
            asm(written, ",".join(["l"] * operands + ["r"] * fused), *addresses)

        run(*refs)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(
        body,
        out_type=(out, out) if fused else out,
        scratch_types=[plgpu.SMEM((found.slots * 32,), jnp.float32)] if fused else [],
        grid=(found.grid,),
        grid_names=("block",),
        num_threads=found.threads // 128,
        thread_name="warpgroup",
    )(*((x, comm, residual, norm) if fused else (x, comm)))
