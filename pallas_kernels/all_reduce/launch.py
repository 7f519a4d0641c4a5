"""A peer kernel's text as a Pallas kernel on the Mosaic GPU backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.all_reduce.plan import Plan
from pallas_kernels.mosaic_ops import plgpu
from pallas_kernels.ptx import asm, global_address, shared_address


def launch(
    text: str,
    plan: Plan,
    x: jax.Array,
    comm: jax.Array,
    residual: jax.Array | None,
    norm: jax.Array | None,
) -> Any:
    """Run `text`, whose operands are x, comm, the sum, or x, comm, residual, norm, the total, the
    normed total, shared memory of [slots, 32] float32."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    fused = residual is not None
    operands = 6 if fused else 3

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(ctx: Any, *refs: Any) -> None:
            del ctx
            addresses = [global_address(ref) for ref in refs[:operands]]
            addresses += [shared_address(ref) for ref in refs[operands:]]
            asm(text, ",".join(["l"] * operands + ["r"] * fused), *addresses)

        run(*refs)

    return plgpu.kernel(
        body,
        out_type=(out, out) if fused else out,
        scratch_types=[plgpu.SMEM((plan.slots * 32,), jnp.float32)] if fused else [],
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=plan.threads // 128,
        thread_name="warpgroup",
    )(*((x, comm, residual, norm) if fused else (x, comm)))


def check_comm(comm: jax.Array | None) -> jax.Array:
    """NotImplementedError where there is no workspace."""
    if comm is None:
        raise NotImplementedError("comm is None: the devices have no workspaces of each other")
    return comm
