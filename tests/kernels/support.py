"""Running one implementation of an operation, and what it is expected to refuse."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import compat

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
CAN_INTERPRET_MOSAIC = hasattr(compat.mosaic_backend(), "InterpretGPUParams")
interprets_mosaic = pytest.mark.skipif(
    not CAN_INTERPRET_MOSAIC, reason="interpreting Mosaic kernels needs jax >= 0.11"
)
# keys of slots never written are NaN and masked after the product, of which the interpreter's NumPy
# may warn
nan_keys_are_meant = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
# largest error of an output row (one query, one head), relative to the norm of that row
TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}
# fp8 pages with 16-bit queries: all products are in float16 or float32, the output is rounded last
FP8_TOLERANCE = {**TOLERANCE, "bfloat16": 5e-3}

# JAX 0.11 says at each lowering that its Triton backend is deprecated; compat.py filters it where
# the kernel is traced, which a cached trace skips
quiet = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def shape_list(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> list[jax.ShapeDtypeStruct]:
    """(shape, dtype) pairs as arguments for compat.lower_for_cuda."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def decode_shapes(
    rows: int, heads: int, pages: tuple[int, ...], width: int, *,
    dtype: Any = jnp.bfloat16, kv_dtype: Any = None, locks: int = 0,
) -> list[jax.ShapeDtypeStruct]:  # fmt: skip
    """Arguments of paged_decode, as shapes: q, K and V [P, S, K, H] = pages, table of `width`
    columns, lengths, locks if any. kv_dtype: of the pages, as dtype if None."""
    pool = (pages, kv_dtype or dtype)
    integers = [(rows, width), (rows,), *([(locks,)] if locks else [])]
    return shape_list(
        [((rows, heads, pages[-1]), dtype), pool, pool, *((x, jnp.int32) for x in integers)]
    )


def module(operation: str, name: str) -> Any:
    """The module of an implementation."""
    entry = pallas_kernels.operations()[operation].find(name)
    return importlib.import_module(entry.module)


def reference(operation: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"pallas_kernels.{operation}.reference"), operation)


def implementation(
    operation: str, name: str, *, interpret: bool, **sizes: int
) -> Callable[..., Any]:
    """The implementation's own function, without the checks of the registry. interpret: run the
    Pallas kernels on the CPU."""
    home = module(operation, name)
    options: dict[str, Any] = {}
    if name != "xla":
        if sizes:
            options["sizes"] = home.Sizes(**sizes)
        if interpret:
            mosaic = name.startswith("mosaic")
            options["interpret"] = compat.mosaic_interpreter() if mosaic else True
    return functools.partial(getattr(home, operation), **options)


def refuses(name: str, case: Any, dtype: str, head_dims: tuple[int, ...] = (64, 128)) -> bool:
    """What this suite says an attention implementation cannot do. head_dims: that the operation's
    Mosaic kernels take."""
    if not name.startswith("mosaic"):
        return False
    odd = case.head_dim not in head_dims or case.page_size % 8 != 0
    return dtype == "float32" or odd or case.fp8


def second_layer(arrays: tuple[Any, ...]) -> tuple[tuple[Any, ...], np.ndarray]:
    """(arrays, first_page) of an attention case (q, k_pages, v_pages, ...), whose pages come behind
    as many of another layer, which hold NaN."""
    q, k_pages, v_pages, *others = arrays
    k_pages, v_pages = (np.concatenate([np.full_like(x, np.nan), x]) for x in (k_pages, v_pages))
    return (q, k_pages, v_pages, *others), np.asarray([len(k_pages) // 2], np.int32)


def reuse_passed_pages(
    k_pages: np.ndarray, v_pages: np.ndarray, page_table: np.ndarray, passed: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The cache after the pages that lie wholly in the first `passed` [B] tokens of their rows went
    to others, who have not written to them: NaN, and some of their table entries are any page."""
    k_pages, v_pages, page_table = (np.array(x) for x in (k_pages, v_pages, page_table))
    for row, count in enumerate(passed // k_pages.shape[1]):
        gone = page_table[row, :count].copy()
        k_pages[gone] = v_pages[gone] = np.nan
        page_table[row, : count // 2] = np.arange(count // 2) % len(k_pages)
    return k_pages, v_pages, page_table


def large_queries(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Queries above float16's 65504 before the scale, below after it."""
    q, *others = arrays
    return ((q.astype(np.float32) * 6e4).astype(q.dtype), *others)


def one_key_wins(arrays: tuple[Any, ...], rows: Any, at: Any) -> tuple[Any, ...]:
    """Queries beyond float16's range: those of packed row rows[i] fit the key of (sequence,
    position) at[i], of fp8 pages, better than any other."""
    q, k_pages, v_pages, table, *others = arrays
    q, size, kv_heads = q.copy(), *k_pages.shape[1:3]
    for row, (sequence, position) in zip(rows, at, strict=True):
        key = k_pages[table[sequence, position // size], position % size].astype(np.float32)
        q[row] = np.repeat(np.sign(key), q.shape[1] // kv_heads, axis=0) * 1e30
    return (q, k_pages, v_pages, table, *others)


def faint_keys(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Every token but a sequence's first weighs 2**-26 of that one, less than float16 has, and its
    value is 2**18 times as large. For head dim 64 and fp8 pages."""
    q, k_pages, v_pages, table, *others = arrays
    k_pages, v_pages = np.zeros_like(k_pages), np.full_like(v_pages, 448)
    k_pages[table[:, 0], 0], v_pages[table[:, 0], 0] = 1, 2.0**-9
    return (np.full_like(q, 2.25), k_pages, v_pages, table, *others)


def assert_close(
    got: Any, want: np.ndarray, dtype: str, tolerance: dict[str, float] = TOLERANCE
) -> None:
    """Row by row: a wrong row does not hide behind many right ones."""
    got = np.asarray(got).astype(np.float32)
    assert got.shape == want.shape
    assert np.isfinite(got).all(), f"{(~np.isfinite(got)).any(-1).sum()} rows are not finite"
    error = np.linalg.norm(got - want, axis=-1)
    norm = np.linalg.norm(want, axis=-1)
    worst = (error / np.maximum(norm, 1e-3)).max(initial=0.0)
    assert worst < tolerance[dtype], f"relative error {worst:.2e} of a row"


def poison(shape: tuple[int, ...], dtype: Any) -> None:
    """Fill device memory with NaN and free it: the next output is likely to be given it."""
    jax.block_until_ready([jax.numpy.full(shape, np.nan, dtype) for _ in range(2)])


def fresh_seed() -> int:
    """A seed that no other run had."""
    return int.from_bytes(np.random.default_rng().bytes(4), "little")
