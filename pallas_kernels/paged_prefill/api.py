"""paged_prefill: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only, sm90_only


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """Mosaic before Triton: 498 against 288 TFLOP/s at 8 x 2048 (H100, 2026-11-25); 62 us against
    189 at 16 x 512 of Gemma 3, 99 against 220 of Phi 3 (H200, 2026-11-28)."""
    if not device.is_cuda:
        return ("xla",)
    if device.capability[0] == 9 and dtype.itemsize == 2:
        return ("mosaic_sm90", "triton", "xla")
    return ("triton", "xla")


OPERATION = Operation(
    name="paged_prefill",
    implementations=(
        Implementation("mosaic_sm90", "pallas_kernels.paged_prefill.mosaic_sm90", sm90_only),
        Implementation("triton", "pallas_kernels.paged_prefill.triton", cuda_only),
        Implementation("xla", "pallas_kernels.paged_prefill.xla"),
    ),
    order=_order,
)


def paged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    q_lens: jax.Array,
    prefix_lens: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    first_page: jax.Array | None = None,
    reach: jax.Array | None = None,
    fixed_tiles: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Attention of the new tokens of B sequences, each after its cached prefix: causal,
    but for what `reach` adds.

    q [T, N, H] packs the new tokens: sequence b has rows q_starts[b] to q_starts[b] + q_lens[b], at
    positions prefix_lens[b] + i, and their keys and values are in the pages already. q_starts are
    multiples of 8 and ascend, q_lens may be 0, T is a multiple of 8. k_pages, v_pages [P, S, K, H],
    of q's dtype (bfloat16, float16 or float32), or of float8_e4m3fn (taken as they are, scale 1)
    with any q. page_table [B, W] int32, entries past a sequence's end may be any
    page. q_starts, q_lens, prefix_lens [B] int32.
    scale: of the scores before softmax, H**-0.5 by default. window: attend to the last `window`
    positions only, the token's own included. soft_cap: scores become cap * tanh(scores / cap).
    first_page [1] int32: the table's pages count from this one (0 if None): where one array holds
    the pages of all layers, those of one layer.
    reach [T] int32: the last position that each packed token sees, for blocks of tokens that see
    all of themselves, such as a picture's (Gemma 3; Gemma team 2025): the block's last position for
    the tokens of a block, its own for any other. Key k is visible to the query at position p if
    k <= reach, and with a window k > p - window. Never less than p, and a block never leaves its
    step: reach is less than prefix_lens[b] + q_lens[b]. Rows of no sequence may hold anything. None
    is causal: every token's own position.
    fixed_tiles: tiles hold a number of tokens that divides FIXED_TILE = 128. What a token gets is
    then bitwise the same however its sequence was cut and packed, as long as every cut is at a
    multiple of 128 (and within no block). It does depend on the tile that a token is in: blocks of
    keys that all queries of the tile see are not masked, and compilers fuse the two cases
    differently. All else does not matter: blocks are counted from the sequence's first key, and one
    of which a query sees nothing adds exact zeros to its sums, or what its first key then
    multiplies by zero.
    implementation: a name, or names in order of preference ("mosaic_sm90", "triton", "xla"); None
    is the default order of this device and of the case.

    Returns [T, N, H] in q's dtype; rows that belong to no sequence are unspecified. Scores, softmax
    and sums are float32. Raises ValueError for arguments that do not fit together,
    NotImplementedError with every reason when no implementation can do the case. After
    FlashAttention-2 (Dao, 2023), with the packing of its variable-length form.
    """
    checks.check_pages(k_pages, v_pages)
    checks.check_queries(q, k_pages)
    if q.shape[0] % 8:
        raise ValueError(f"q {list(q.shape)}: the number of packed rows must be a multiple of 8")
    rows = page_table.shape[0]
    checks.check_int32("page_table", page_table, (rows, *page_table.shape[1:2]))
    checks.check_int32("q_starts", q_starts, (rows,))
    checks.check_int32("q_lens", q_lens, (rows,))
    checks.check_int32("prefix_lens", prefix_lens, (rows,))
    checks.check_window(window)
    checks.check_soft_cap(soft_cap)
    if first_page is not None:
        checks.check_int32("first_page", first_page, (1,))
    if reach is not None:
        checks.check_int32("reach", reach, q.shape[:1])
    return OPERATION(
        q,
        k_pages,
        v_pages,
        page_table,
        q_starts,
        q_lens,
        prefix_lens,
        first_page,
        reach,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        soft_cap=None if soft_cap is None else float(soft_cap),
        fixed_tiles=bool(fixed_tiles),
        implementation=implementation,
        dtype=q.dtype,
    )
