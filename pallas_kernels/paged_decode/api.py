"""paged_decode: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only, sm90_only


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """Measured on an H100. Clusters first, where there are few rows (else they refuse): 5.3 us
    against 7.1 (8B, B=1, 1,024 tokens), 52 against 53 (32,768), a token 5.52 ms against 5.58
    (2026-11-26). Triton before Mosaic's loader: 96% against 86% of bandwidth at B=64, 1,024 tokens
    (2026-11-23)."""
    if not device.is_cuda:
        return ("xla",)
    if device.capability[0] == 9 and dtype.itemsize == 2:
        return ("mosaic_cluster", "triton", "mosaic_sm90", "xla")
    return ("triton", "xla")


OPERATION = Operation(
    name="paged_decode",
    implementations=(
        Implementation("triton", "pallas_kernels.paged_decode.triton", cuda_only),
        Implementation("mosaic_sm90", "pallas_kernels.paged_decode.mosaic_sm90", sm90_only),
        Implementation("mosaic_cluster", "pallas_kernels.paged_decode.mosaic_cluster", sm90_only),
        Implementation("xla", "pallas_kernels.paged_decode.xla"),
    ),
    order=_order,
)


def decode_implementation(
    q: Any, k_pages: Any, page_table: Any, implementation: str | Sequence[str] | None = None
) -> str:
    """Name of the implementation that `paged_decode` takes for arrays of these shapes and dtypes
    (or their specs) on the present device. Raises what it raises."""
    return OPERATION.chosen(q, k_pages, page_table, implementation=implementation, dtype=q.dtype)


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    locks: jax.Array | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    first_page: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Attention of one token per row over its cached tokens, itself included.

    q [B, N, H] and k_pages, v_pages [P, S, K, H], of one dtype (bfloat16, float16 or float32), or
    pages of float8_e4m3fn (taken as they are, scale 1) with any q.
    page_table [B, W] int32: the pages of a row in order; entries past its length may be any page.
    lengths [B] int32: cached tokens, the current one included; 0 gives a row of zeros.
    locks [at least B * K] int32, all 0: lets the Triton kernel merge its splits in the same launch.
    They are 0 again afterwards; calls that share locks must not overlap, so pass the returned ones
    on, and donate them to the program.
    scale: of the scores before softmax, H**-0.5 by default. window: attend to the last `window`
    positions only, the current one included. soft_cap: scores become cap * tanh(scores / cap).
    first_page [1] int32: the table's pages count from this one (0 if None): where one array holds
    the pages of all layers, those of one layer.
    implementation: a name, or names in order of preference ("triton", "mosaic_sm90", "xla"); None
    is the default order of this device.

    Returns [B, N, H] in q's dtype, with locks the pair of that and the locks; scores, softmax and
    sums are float32. Raises ValueError for arguments that do not fit together, NotImplementedError
    with every reason when no implementation can do the case. After FlashDecoding (split KV) and
    PagedAttention (Kwon et al., 2023).
    """
    checks.check_pages(k_pages, v_pages)
    checks.check_queries(q, k_pages)
    rows = q.shape[0]
    checks.check_int32("page_table", page_table, (rows, *page_table.shape[1:2]))
    checks.check_int32("lengths", lengths, (rows,))
    checks.check_window(window)
    checks.check_soft_cap(soft_cap)
    if first_page is not None:
        checks.check_int32("first_page", first_page, (1,))
    if locks is not None and (
        locks.dtype != np.int32 or locks.ndim != 1 or locks.size < rows * k_pages.shape[2]
    ):
        raise ValueError(
            f"locks is {locks.dtype}{list(locks.shape)}: expected int32[at least "
            f"{rows * k_pages.shape[2]}]"
        )
    return OPERATION(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        locks,
        first_page,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        soft_cap=None if soft_cap is None else float(soft_cap),
        implementation=implementation,
        dtype=q.dtype,
    )
