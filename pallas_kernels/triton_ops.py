"""Pieces of the Triton kernels: index arrays, masks and gathers from the paged cache.

Two rules hold throughout. A gather indexes every dimension with an integer array (interpret mode
cannot mix slices and arrays in one index). Sizes of loads and stores are powers of two, so a head
dim such as 80 is padded to 128 columns that are masked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.softmax import LOG2E

plt = compat.triton_backend()
F16_MAX = 65504.0


def column(x: jax.Array, width: int) -> jax.Array:
    """[n] -> [n, width], the same value along a row."""
    return lax.broadcast_in_dim(x, (x.shape[0], width), (0,))


def row(x: jax.Array, height: int) -> jax.Array:
    """[n] -> [height, n], the same value along a column."""
    return lax.broadcast_in_dim(x, (height, x.shape[0]), (1,))


def ceil_div(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x + (n - 1), jnp.int32(n))


def divmod_by(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of a non-negative int32 array by a static n."""
    if n & (n - 1) == 0:
        shift, mask = jnp.full_like(x, n.bit_length() - 1), jnp.full_like(x, n - 1)
        return lax.shift_right_logical(x, shift), lax.bitwise_and(x, mask)
    return lax.div(x, jnp.full_like(x, n)), lax.rem(x, jnp.full_like(x, n))


def dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """[m, k] x b -> [m, n] in float32, contracting b's dimension `contract`. float32 operands are
    multiplied in true float32, not TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def scaled_queries(q: jax.Array, pages: Any, scale: float) -> tuple[jax.Array, float]:
    """(queries in the dtype of the products, what is left to multiply those by) so that the results
    are scores times log2(e). pages: the keys' array or reference.

    16-bit queries on fp8 pages are float16, whatever they were: every e4m3 number is one of float16
    too, and Hopper converts two of them in one instruction, where the way to bfloat16 takes four or
    five (through float16 and float32). float16 ends at 65504, so the scale goes in before, in
    float32, and what is still beyond is clamped: infinite scores would make NaN of a row. The
    rounding is an eighth of that which bfloat16 queries went through to get here.
    """
    if pages.dtype.itemsize > 1 or q.dtype.itemsize > 2:
        return q, scale * LOG2E
    scaled = q.astype(jnp.float32) * (scale * LOG2E)
    return jnp.clip(scaled, -F16_MAX, F16_MAX).astype(jnp.float16), 1.0


def deal(x: jax.Array, turns: int) -> jax.Array:
    """Columns of x [M, N] dealt out to N / turns places in `turns` turns: column c goes to
    (c % turns) * (N / turns) + c // turns. Dealing the result in N / turns turns undoes it."""
    rows, columns = x.shape
    if turns == 1 or turns == columns:
        return x
    return x.reshape(rows, columns // turns, turns).transpose(0, 2, 1).reshape(rows, columns)


def base2_scores(products: jax.Array, factor: float, soft_cap: float | None) -> jax.Array:
    """Products of queries and keys -> scores times log2(e), capped where there is a cap. factor: of
    scaled_queries."""
    if soft_cap is None:
        return products * factor if factor != 1 else products
    limit = soft_cap * LOG2E
    return jnp.tanh(products * (factor / limit)) * limit


def headroom(dtype: Any) -> float:
    """Bits above 1 that the largest softmax weight takes in products of `dtype`.

    float16 drops what is below 2**-25, while the softmax sum, of the float32 weights, keeps it: a
    long context of small weights would pull the result to zero. With 7 bits up that is less than
    2**-32 a token, which 2**17 of them do not show. Not more bits: beyond 2**26 a score is rounded
    to multiples of 8 or more, which turns 7 into 8 or 0, but 8 into 16, and 2**16 is infinite.
    """
    return 7.0 if dtype == jnp.float16 else 0.0


def check_pages(pages: jax.Array) -> None:
    """Offsets into an array of up to 2**32 bytes are signed 32-bit counts of elements, which wrap
    in pages of one byte an element (JAX 0.10 to 0.12)."""
    if pages.dtype.itemsize == 1 and 2**31 <= pages.size <= 2**32:
        raise NotImplementedError(
            f"{pages.dtype.name} pages of {pages.size} bytes: the offsets wrap: they "
            "overflow 32 bits"
        )


def load_tokens(
    pages_ref: Any,
    table_ref: Any,
    first_page: jax.Array,
    sequence: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    live: jax.Array | None,
    width: int,
    dtype: Any,
) -> jax.Array:
    """Rows `tokens` [n] of one KV head of `sequence` -> [n, width] in dtype, zeros where not live.

    pages_ref [P, S, K, H], table_ref [B, W], whose pages count from first_page. live [n]: None when
    every token is. Token -> (page, slot) happens here, so the block of a kernel need not fit the
    page size.
    """
    page_size, head_dim = pages_ref.shape[1], pages_ref.shape[3]
    count = tokens.shape[0]
    index, slot = divmod_by(tokens, page_size)
    page = plt.load(
        table_ref.at[jnp.full_like(index, sequence), index], mask=live, other=_zero(live)
    )
    page = page + first_page
    columns = row(jnp.arange(width, dtype=jnp.int32), count)
    mask = None if live is None else column(live, width)
    if width != head_dim:
        inside = columns < head_dim
        mask = inside if mask is None else mask & inside
    view = pages_ref.at[
        column(page, width), column(slot, width), jnp.full((count, width), head, jnp.int32), columns
    ]
    return plt.load(view, mask=mask, other=None if mask is None else 0.0).astype(dtype)


def _zero(mask: jax.Array | None) -> int | None:
    return None if mask is None else 0
