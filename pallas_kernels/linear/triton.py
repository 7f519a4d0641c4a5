"""linear for few rows, Pallas on the Triton backend: each weight is read once, the rest is fused.

Grid (column blocks, splits). A program owns block_n columns of the result (of gate and of up, when
gated) and streams them over its share of K; x, a few KB, comes from the L2 each time:

                    block_n columns                        gated: the same columns of `up` too
        w [K, N]  |  tile 0  block_k rows  |  <- in flight, num_stages deep
                  |  tile 1                |
                  |  ...                   |               transposed: w [N, K], tiles lie sideways
    x [M, K] tiles ----> times norm ----> product ----> sums [rows, block_n] float32 (registers)
                   \\---> squares, summed ------------> rsqrt(mean + eps) scales sums at the end:
                                                        the norm needs no pass of its own over x

    end of K:  sums --> scale of w --> bias --> act(gate) * up --> residual --> out, rounded once

Two products. mma: M padded to 16 rows for the tensor cores; tiles go through shared memory, which
Triton's pipeliner keeps num_stages - 1 tiles ahead. Otherwise plain multiply-adds for 1 to 4 rows:
a tile goes straight to registers, where each thread keeps sums of its own places, added up after
the loop only; the loop itself carries num_stages - 1 tiles ahead.

splits > 1: each split writes float32 sums and squares, and a second launch adds them and finishes.
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
from pallas_kernels.linear import activations
from pallas_kernels.linear.features import features
from pallas_kernels.triton_ops import column, dot, plt, row
from pallas_kernels.tuning import tuned

MAX_ROWS, MAX_FMA_ROWS = 16, 4
MERGE_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class Sizes:
    """block_n: columns a program, block_k: rows of w a tile; powers of two. num_stages: tiles in
    flight, the one in use included. splits: programs that share a column block. mma: tensor cores,
    or multiply-adds. evict_first: weights do not push other data out of the L2."""

    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 5
    splits: int = 1
    mma: bool = True
    evict_first: bool = True


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    streams, itemsize = 1 + features["gated"], features["itemsize"]
    enough = 1.4 * (device.cores or 132)
    # memory moves in sectors of 32 bytes, so narrower tiles of a row-major w would waste some
    least = 8 if features["transposed"] else 32 // itemsize
    block_n = 128 // streams
    while block_n > least and pl.cdiv(features["size_out"], block_n) < enough:
        block_n //= 2
    width = pl.next_power_of_2(features["size_in"])
    few = pl.cdiv(features["size_out"], block_n) < enough
    if features["rows"] == 1:
        # 64 sums a thread, so 8 loads of 16 bytes in bfloat16; more threads where programs are few
        warps = 8 if few else 4
        block_k = min(64 * 32 * warps // (streams * block_n), width)
        stages = 1 if block_k == width else 2
        base = Sizes(block_n, block_k, num_warps=warps, num_stages=stages, mma=False)
    else:
        block_k = min(16384 // (streams * block_n * itemsize), 256 // max(1, itemsize // 2), width)
        base = Sizes(block_n, max(16, block_k), num_stages=5)
    return dataclasses.replace(base, **tuned(device, "linear", "triton", features))


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is static about a launch. rows M, size_k K, size_n N', streams: 2 when gated."""

    rows: int
    size_k: int
    size_n: int
    streams: int
    transposed: bool
    sizes: Sizes
    eps: float
    act: str | None

    @property
    def padded_rows(self) -> int:
        return MAX_ROWS if self.sizes.mma else pl.next_power_of_2(self.rows)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.size_k, self.sizes.block_k)

    def share(self, split: jax.Array) -> tuple[Any, Any]:
        """(first tile, one past the last) of a split; the last splits may have none."""
        if self.sizes.splits == 1:
            return 0, self.tiles
        share = pl.cdiv(self.tiles, self.sizes.splits)
        return split * share, jnp.minimum((split + 1) * share, self.tiles)


def _places(job: _Job, i: Any, last: Any = None) -> tuple[jax.Array, jax.Array | None]:
    """Rows of w in tile i, and which of them exist (None: all). last: tile i may lie beyond."""
    ks = i * job.sizes.block_k + jnp.arange(job.sizes.block_k, dtype=jnp.int32)
    live = None if job.size_k % job.sizes.block_k == 0 else ks < job.size_k
    if last is not None:
        before = jnp.full(ks.shape, i < last)
        live = before if live is None else live & before
    return ks, live


def _weights(job: _Job, ref: Any, ks: Any, live: Any, columns: Any, stream: int) -> jax.Array:
    """w at ks x columns: [block_k, block_n], or sideways where w is."""
    along_k, along_n = (row, column) if job.transposed else (column, row)
    k, n = ks.shape[0], columns.shape[0]
    at_k, at_n = along_k(ks, n), along_n(columns + stream * job.size_n, k)
    mask = None if live is None else along_k(live, n)
    if job.size_n % n:
        inside = along_n(columns < job.size_n, k)
        mask = inside if mask is None else mask & inside
    return plt.load(
        ref.at[at_n, at_k] if job.transposed else ref.at[at_k, at_n],
        mask=mask,
        other=_zero(ref, mask),
        eviction_policy="evict_first" if job.sizes.evict_first else None,
    )


def _zero(ref: Any, mask: jax.Array | None) -> Any:
    return None if mask is None else jnp.zeros((), ref.dtype)


def _mma_sums(job: _Job, refs: dict[str, Any], columns: Any, begin: Any, end: Any) -> Any:
    """Products of tiles on the tensor cores: (sums of each stream [16, block_n], squares [16])."""
    x_ref, w_ref, norm_ref = refs["x"], refs["w"], refs.get("norm")
    sizes, dtype = job.sizes, refs["x"].dtype
    row_ids = jnp.arange(MAX_ROWS, dtype=jnp.int32)
    used = None if job.rows == MAX_ROWS else column(row_ids < job.rows, sizes.block_k)

    def tile(i, carry):
        sums, squares = carry
        ks, live = _places(job, i)
        mask = used
        if live is not None:
            mask = row(live, MAX_ROWS) if used is None else used & row(live, MAX_ROWS)
        view = x_ref.at[column(row_ids, sizes.block_k), row(ks, MAX_ROWS)]
        x = plt.load(view, mask=mask, other=_zero(x_ref, mask))
        if norm_ref is not None:
            x32 = x.astype(jnp.float32)
            squares += x32 * x32
            norm = plt.load(norm_ref.at[ks], mask=live, other=_zero(norm_ref, live))
            x = (x * row(norm, MAX_ROWS)).astype(dtype)
        tiles = [
            _weights(job, w_ref, ks, live, columns, s).astype(dtype) for s in range(job.streams)
        ]
        sums = tuple(
            total + dot(x, w, 1 if job.transposed else 0)
            for total, w in zip(sums, tiles, strict=True)
        )
        return sums, squares

    zeros = tuple(jnp.zeros((MAX_ROWS, sizes.block_n), jnp.float32) for _ in range(job.streams))
    squares = None if norm_ref is None else jnp.zeros((MAX_ROWS, sizes.block_k), jnp.float32)
    sums, squares = lax.fori_loop(begin, end, tile, (zeros, squares))
    return sums, None if squares is None else jnp.sum(squares, axis=1)


def _fma_sums(job: _Job, refs: dict[str, Any], columns: Any, begin: Any, end: Any) -> Any:
    """Multiply-adds: (sums of each stream [rows, block_n], squares [rows]), rows a power of two."""
    x_ref, w_ref, norm_ref = refs["x"], refs["w"], refs.get("norm")
    sizes = job.sizes
    along_k = row if job.transposed else column
    ahead = sizes.num_stages - 1

    def fetch(i):
        ks, live = _places(job, i, end if ahead else None)
        tiles = tuple(_weights(job, w_ref, ks, live, columns, s) for s in range(job.streams))
        x = tuple(
            plt.load(x_ref.at[jnp.full_like(ks, m), ks], mask=live, other=_zero(x_ref, live))
            for m in range(job.rows)
        )
        if norm_ref is None:
            return tiles, x, None
        return tiles, x, plt.load(norm_ref.at[ks], mask=live, other=_zero(norm_ref, live))

    def step(i, carry):
        sums, squares, fetched = carry
        fetched = (*fetched, fetch(i + ahead))
        tiles, x, norm = fetched[0]
        x32 = [value.astype(jnp.float32) for value in x]
        if norm is not None:
            squares = tuple(s + value * value for s, value in zip(squares, x32, strict=True))
            x32 = [value * norm.astype(jnp.float32) for value in x32]
        across = [along_k(value, sizes.block_n) for value in x32]
        tiles32 = [w.astype(jnp.float32) for w in tiles]
        sums = tuple(
            tuple(total + value * w for total, value in zip(totals, across, strict=True))
            for totals, w in zip(sums, tiles32, strict=True)
        )
        return sums, squares, fetched[1:]

    shape = (sizes.block_k, sizes.block_n)
    zero = jnp.zeros(shape[::-1] if job.transposed else shape, jnp.float32)
    start = (
        ((zero,) * job.rows,) * job.streams,
        (jnp.zeros((sizes.block_k,), jnp.float32),) * (0 if norm_ref is None else job.rows),
        tuple(fetch(begin + j) for j in range(ahead)),
    )
    sums, squares, _ = lax.fori_loop(begin, end, step, start)
    axis = 1 if job.transposed else 0
    rows = tuple(_stack([jnp.sum(part, axis=axis) for part in parts], job) for parts in sums)
    return rows, None if norm_ref is None else _stack([jnp.sum(part) for part in squares], job)


def _stack(values: list[jax.Array], job: _Job) -> jax.Array:
    """Values of one shape, below each other, up to the padded rows."""
    ids = jnp.arange(job.padded_rows, dtype=jnp.int32)
    shape = (job.padded_rows, *values[0].shape)
    out = jnp.zeros(shape, jnp.float32)
    for m, value in enumerate(values):
        if value.ndim:
            out = jnp.where(column(ids == m, shape[1]), row(value, shape[0]), out)
        else:
            out = jnp.where(ids == m, value, out)
    return out


def _read_after(job: _Job, refs: dict[str, Any], rows: int, columns: jax.Array) -> dict[str, Any]:
    """What is to come after the product, in float32: scale and bias of each stream, residual, all
    as [rows, n]. Read before the product, whose loop hides the way to memory."""
    inside = columns < job.size_n
    after: dict[str, Any] = {}
    for name in ("scale", "bias"):
        if name in refs:
            ref = refs[name]
            views = [ref.at[columns + s * job.size_n] for s in range(job.streams)]
            values = [plt.load(view, mask=inside, other=_zero(ref, inside)) for view in views]
            after[name] = [row(value.astype(jnp.float32), rows) for value in values]
    if "residual" in refs:
        at, mask = _result(job, rows, columns)
        values = plt.load(refs["residual"].at[at], mask=mask, other=_zero(refs["residual"], mask))
        after["residual"] = values.astype(jnp.float32)
    return after


def _result(job: _Job, rows: int, columns: jax.Array) -> tuple[Any, jax.Array]:
    """Where rows x columns of the result are, and which of them exist."""
    at_row = column(jnp.arange(rows, dtype=jnp.int32), columns.shape[0])
    at_column = row(columns, rows)
    return (at_row, at_column), (at_row < job.rows) & (at_column < job.size_n)


def _finish(
    job: _Job, out_ref: Any, sums: Any, squares: Any, columns: jax.Array, after: dict[str, Any]
) -> None:
    """Everything after the product, and the store."""
    rows, n = sums[0].shape
    if squares is not None:
        sums = [s * column(lax.rsqrt(squares / job.size_k + job.eps), n) for s in sums]
    if "scale" in after:
        sums = [s * scale for s, scale in zip(sums, after["scale"], strict=True)]
    if "bias" in after:
        sums = [s + bias for s, bias in zip(sums, after["bias"], strict=True)]
    out = sums[0] if job.act is None else activations.apply_in_kernel(job.act, sums[0]) * sums[1]
    if "residual" in after:
        out += after["residual"]
    at, mask = _result(job, rows, columns)
    plt.store(out_ref.at[at], out.astype(out_ref.dtype), mask=mask)


def _product_kernel(*all_refs, names, job):
    refs = dict(zip(names, all_refs, strict=True))
    block, split = pl.program_id(0), pl.program_id(1)
    columns = block * job.sizes.block_n + jnp.arange(job.sizes.block_n, dtype=jnp.int32)
    begin, end = job.share(split)
    products = _mma_sums if job.sizes.mma else _fma_sums
    if job.sizes.splits == 1:
        after = _read_after(job, refs, job.padded_rows, columns)
        sums, squares = products(job, refs, columns, begin, end)
        _finish(job, refs["out"], sums, squares, columns, after)
        return
    sums, squares = products(job, refs, columns, begin, end)
    (at_row, at_column), mask = _result(job, job.padded_rows, columns)
    for s, total in enumerate(sums):
        at = jnp.full_like(at_row, split), jnp.full_like(at_row, s), at_row, at_column
        plt.store(refs["partial"].at[at], total, mask=mask)
    if squares is not None:  # the same in every column block: the first one writes them
        row_ids = jnp.arange(job.padded_rows, dtype=jnp.int32)
        view = refs["squares"].at[jnp.full_like(row_ids, split), row_ids]
        plt.store(view, squares, mask=(row_ids < job.rows) & (block == 0))


def _merge_kernel(*all_refs, names, job):
    refs = dict(zip(names, all_refs, strict=True))
    rows, splits = pl.next_power_of_2(job.rows), range(job.sizes.splits)
    columns = pl.program_id(0) * MERGE_COLUMNS + jnp.arange(MERGE_COLUMNS, dtype=jnp.int32)
    after = _read_after(job, refs, rows, columns)
    (at_row, at_column), mask = _result(job, rows, columns)

    def part(split, stream):
        at = jnp.full_like(at_row, split), jnp.full_like(at_row, stream), at_row, at_column
        return plt.load(refs["partial"].at[at], mask=mask, other=0.0)

    sums = [sum(part(split, stream) for split in splits) for stream in range(job.streams)]
    squares = None
    if "squares" in refs:
        row_ids = jnp.arange(rows, dtype=jnp.int32)
        views = [refs["squares"].at[jnp.full_like(row_ids, split), row_ids] for split in splits]
        squares = sum(plt.load(view, mask=row_ids < job.rows, other=0.0) for view in views)
    _finish(job, refs["out"], sums, squares, columns, after)


def linear(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    act: str | None = None,
    transposed: bool = False,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See pallas_kernels.linear. interpret: run on any backend, slowly."""
    rows, size_k = x.shape
    streams = 1 if act is None else 2
    size_n = w.shape[0 if transposed else 1] // streams
    device = current_device()
    if sizes is None:
        sizes = default_sizes(device, features(x, w, act, transposed))
    _refuse(x, w, norm, sizes, device)
    job = _Job(rows, size_k, size_n, streams, transposed, sizes, eps, act)
    inputs = {"x": x, "w": w, "norm": norm}
    after = {"scale": scale, "bias": bias, "residual": residual}
    inputs, after = ({k: v for k, v in d.items() if v is not None} for d in (inputs, after))
    out = {"out": jax.ShapeDtypeStruct((rows, size_n), x.dtype)}
    grid = (pl.cdiv(size_n, sizes.block_n), sizes.splits)
    if sizes.splits == 1:
        return _launch(_product_kernel, job, grid, {**inputs, **after}, out, interpret)["out"]
    partial = {"partial": jax.ShapeDtypeStruct((sizes.splits, streams, rows, size_n), jnp.float32)}
    if norm is not None:
        partial["squares"] = jax.ShapeDtypeStruct((sizes.splits, rows), jnp.float32)
    parts = _launch(_product_kernel, job, grid, inputs, partial, interpret)
    grid = (pl.cdiv(size_n, MERGE_COLUMNS),)
    return _launch(_merge_kernel, job, grid, {**parts, **after}, out, interpret)["out"]


def _refuse(
    x: jax.Array, w: jax.Array, norm: jax.Array | None, sizes: Sizes, device: Device
) -> None:
    rows = x.shape[0]
    most = MAX_ROWS if sizes.mma else MAX_FMA_ROWS
    if rows > most:
        raise NotImplementedError(f"{rows} rows are above {most}")
    if w.size >= 1 << 31:
        raise NotImplementedError(f"w {list(w.shape)}: 32-bit indices do not reach its end")
    if w.dtype == jnp.float8_e4m3fn and device.is_cuda and device.capability < (8, 9):
        raise NotImplementedError(f"float8_e4m3fn needs compute capability 8.9, not {device.kind}")
    if sizes.mma and norm is not None and x.dtype == jnp.float16:
        raise NotImplementedError("x * norm before its normalization may overflow float16")


def _launch(
    kernel: Any, job: _Job, grid: tuple[int, ...], inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct], interpret: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    merge = kernel is _merge_kernel
    found = triton_call(
        functools.partial(kernel, names=(*inputs, *outputs), job=job),
        name="linear_merge" if merge else "linear",
        grid=grid,
        out_shape=list(outputs.values()),
        num_warps=2 if merge else job.sizes.num_warps,
        # without tensor cores the kernel itself keeps tiles in flight
        num_stages=job.sizes.num_stages if job.sizes.mma and not merge else 1,
        interpret=interpret,
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))
