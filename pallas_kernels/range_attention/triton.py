"""Attention within ranges, Pallas on the Triton backend.

Grid (ceil(S / rows), N, B). A program has `rows` queries of one head in registers and goes through
the keys of that head, `block` at a time, from the first start to the last end of its queries:

    patches                0 ... first start ... last start ..... first end ... last end ... S
                                 |--block--|--block--|--block--|--block--|--block--|
    all rows see all of it                 |<-- no mask ------>|
    some do                      |<------->|                   |<----- masked ---->|

    per block: K [block, H] -> scores [rows, block] -> softmax, online, base 2
               V [block, H] -> acc [rows, H] float32 (registers)

Programs of one head come one after the other, so its keys and values are read from the L2. A head
dim that is no power of two is several pieces that are: 80 is 64 + 16, where one padded piece of 128
would be multiplied 1.6 times. Pieces are of 16 numbers at least, so 72 is 64 + 16, half of which is
masked. Without ranges (tiles) only a last block that S does not fill is masked. Windows, whose
blocks all have an edge in them, are one masked loop.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.device import Device, current_device
from pallas_kernels.softmax import LOG2E, NEG, TINY
from pallas_kernels.triton_ops import ceil_div, column, dot, headroom, plt, row
from pallas_kernels.tuning import tuned

SMALLEST = 16
"""Numbers of a product's axis that tensor cores take at least."""
WIDEST = 256
"""Head dim: 64 rows of float32 sums are 128 registers of a thread with 4 warps."""
MAX_INT32 = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: queries of a program; block: keys a step; both powers of two."""

    rows: int = 128
    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


def features(q: jax.Array | jax.ShapeDtypeStruct, most: int | None) -> dict[str, int]:
    """What tuned sizes depend on. most: 0 where nothing is said about ranges."""
    return {
        "tokens": q.shape[1],
        "head_dim": q.shape[-1],
        "itemsize": q.dtype.itemsize,
        "most": most or 0,
    }


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    if features["itemsize"] == 4:  # true float32 products do without tensor cores
        base = Sizes(rows=64, block=32, num_warps=4, num_stages=2)
    elif 0 < features["most"] <= 64:
        base = Sizes(rows=64)
    elif features["head_dim"] > 128:
        base = Sizes(rows=64, block=32, num_warps=8)
    else:
        base = Sizes()
    return dataclasses.replace(base, **tuned(device, "range_attention", "triton", features))


def pieces_of(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(first, width) of each piece of a head, widths powers of two; the last may be too wide."""
    found, first = [], 0
    while first < head_dim:
        left = head_dim - first
        width = max(1 << (left.bit_length() - 1), SMALLEST)
        found.append((first, width))
        first += width
    return tuple(found)


def _load(
    ref: Any, batch: jax.Array, head: jax.Array, at: jax.Array, live: jax.Array | None,
    pieces: tuple[tuple[int, int], ...],
) -> list[jax.Array]:  # fmt: skip
    """Patches `at` [n] of a head, [n, width] of each piece; zeros where not live and past H."""
    views = _views(ref, batch, head, at, live, pieces)
    return [plt.load(view, mask=mask, other=None if mask is None else 0.0) for view, mask in views]


def _views(
    ref: Any, batch: jax.Array, head: jax.Array, at: jax.Array, live: jax.Array | None,
    pieces: tuple[tuple[int, int], ...],
) -> list[tuple[Any, jax.Array | None]]:  # fmt: skip
    """Where the pieces lie in `ref` [B, S, N, H], and their masks."""
    count, head_dim = at.shape[0], ref.shape[-1]
    found = []
    for first, width in pieces:
        columns = row(first + jnp.arange(width, dtype=jnp.int32), count)
        shape = (count, width)
        mask = None if live is None else column(live, width)
        if first + width > head_dim:
            inside = columns < head_dim
            mask = inside if mask is None else mask & inside
        index = jnp.full(shape, batch, jnp.int32), column(at, width), jnp.full(shape, head), columns
        found.append((ref.at[index], mask))
    return found


def _kernel(q_ref, k_ref, v_ref, *refs, rows, block, pieces, factor, near):
    *range_refs, out_ref = refs
    offset, head, batch = pl.program_id(0) * rows, pl.program_id(1), pl.program_id(2)
    patches = q_ref.shape[1]
    at = offset + jnp.arange(rows, dtype=jnp.int32)
    mine = at < patches if patches % rows else None
    q = _load(q_ref, batch, head, at, mine, pieces)
    room = headroom(q[0].dtype)

    starts, ends = jnp.zeros_like(at), jnp.full_like(at, patches)
    if range_refs:
        where = jnp.full_like(at, batch), at
        starts, ends = (
            plt.load(ref.at[where], mask=mine, other=None if mine is None else other)
            for ref, other in zip(range_refs, (MAX_INT32, 0), strict=True)
        )
    first, last = jnp.maximum(jnp.min(starts), 0), jnp.minimum(jnp.max(ends), patches)
    begin, end = lax.div(first, jnp.int32(block)), ceil_div(last, block)

    def step(number, carry, masked):
        top, total, *sums = carry
        keys = number * block + jnp.arange(block, dtype=jnp.int32)
        live = None
        if masked:
            live = (keys >= first) & (keys < last)
        k = _load(k_ref, batch, head, keys, live, pieces)
        scores = functools.reduce(jnp.add, (dot(a, b, 1) for a, b in zip(q, k, strict=True)))
        scores = scores * factor
        if masked:
            key = row(keys, rows)
            seen = (key >= column(starts, block)) & (key < column(ends, block))
            scores = jnp.where(seen, scores, NEG)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) - room)
        # a row that saw nothing yet counts 1 a key here; its first real score shrinks that to 0
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        v = _load(v_ref, batch, head, keys, live, pieces)
        total = total * shrink + jnp.sum(weights, axis=1)
        weights = weights.astype(v[0].dtype)
        sums = [x * shrink[:, None] + dot(weights, y, 0) for x, y in zip(sums, v, strict=True)]
        return new_top, total, *sums

    carry = (
        jnp.full((rows,), NEG, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        *(jnp.zeros((rows, width), jnp.float32) for _, width in pieces),
    )
    masked, free = functools.partial(step, masked=True), functools.partial(step, masked=False)
    if near:
        carry = lax.fori_loop(begin, end, masked, carry)
    else:  # rows past the last patch see nothing, and need not
        latest, earliest = jnp.max(starts), jnp.min(ends)
        if mine is not None:
            latest = jnp.max(jnp.where(mine, starts, 0))
            earliest = jnp.min(jnp.where(mine, ends, MAX_INT32))
        free_begin = jnp.clip(ceil_div(latest, block), begin, jnp.maximum(begin, end))
        free_end = lax.div(jnp.minimum(earliest, patches), jnp.int32(block))
        free_end = jnp.maximum(free_end, free_begin)
        carry = lax.fori_loop(begin, free_begin, masked, carry)
        carry = lax.fori_loop(free_begin, free_end, free, carry)
        carry = lax.fori_loop(free_end, end, masked, carry)
    _, total, *sums = carry
    share = jnp.where(starts < ends, 1 / jnp.maximum(total, TINY), 0)
    views = _views(out_ref, batch, head, at, mine, pieces)
    for x, (view, mask) in zip(sums, views, strict=True):
        plt.store(view, (x * share[:, None]).astype(out_ref.dtype), mask=mask)


def range_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None = None,
    ends: jax.Array | None = None,
    *,
    most: int | None = None,
    scale: float,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See pallas_kernels.range_attention. interpret: run on any backend, slowly."""
    times, patches, heads, head_dim = q.shape
    if head_dim > WIDEST:
        raise NotImplementedError(f"head dim {head_dim} is above {WIDEST}")
    if sizes is None:
        sizes = default_sizes(current_device(), features(q, most))
    ranges = () if starts is None or ends is None else (starts, ends)
    return triton_call(
        functools.partial(
            _kernel,
            rows=sizes.rows,
            block=sizes.block,
            pieces=pieces_of(head_dim),
            factor=scale * LOG2E,
            near=most is not None and most <= sizes.block,
        ),
        name="range_attention",
        grid=(pl.cdiv(patches, sizes.rows), heads, times),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
    )(q, k, v, *ranges)
