"""Whether weights are numbers, asked while they are copied to where they stay.

On the host a block is checked while it is in the cache. A sum of squares tells in one pass whether
float32 holds infinity or NaN; it overflows with finite numbers too, and then each is looked at.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.errors import ModelLoadError

_CHUNK = 1 << 20
"""Bytes read at a time, about what a cache of the second level holds."""
_BLOCK = 64
"""Rows transposed at a time: both sides of the copy stay in the cache."""
_EXPONENT = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}
"""All ones in infinity and NaN."""


def copy(tensor: np.ndarray, out: np.ndarray, name: str, *, transpose: bool = False) -> None:
    """`tensor` [n, ...], maybe a view of a mapped file, or with `transpose` its transpose, into
    `out`, in out's dtype. Raises ModelLoadError, with `name`, where that gives infinity or NaN."""
    step = max(_CHUNK // max(tensor[:1].nbytes, 1) // _BLOCK, 1) * _BLOCK
    for start in range(0, tensor.shape[0], step):
        chunk = np.ascontiguousarray(tensor[start : start + step])
        if chunk.dtype != out.dtype:
            with np.errstate(over="ignore", invalid="ignore"):
                chunk = chunk.astype(out.dtype)
        if not all_finite(chunk):
            raise error(name, out.dtype)
        if not transpose:
            out[start : start + step] = chunk
            continue
        for row in range(0, chunk.shape[0], _BLOCK):
            block = chunk[row : row + _BLOCK]
            out[:, start + row : start + row + len(block)] = block.T


def all_finite(block: np.ndarray) -> bool:
    """Whether a contiguous array of any float dtype holds neither infinity nor NaN."""
    flat = block.reshape(-1)
    if block.dtype == np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.dot(flat, flat)
        return math.isfinite(squares) or bool(np.isfinite(flat).all())
    exponent = _EXPONENT.get(block.dtype)
    if exponent is None:
        return bool(np.isfinite(flat).all())
    return not flat.size or bool((flat.view(np.uint16) & exponent).max() != exponent)


@jax.jit
def on_device(array: jax.Array) -> jax.Array:
    """Whether `array` holds neither infinity nor NaN: [] bool. One small program per shape."""
    return jnp.isfinite(array).all()


def check(flags: dict[str, jax.Array], dtype: np.dtype) -> None:
    """Waits for the flags of `on_device` by tensor; raises ModelLoadError with the first that has
    other than finite numbers."""
    for name, finite in jax.device_get(flags).items():
        if not finite:
            raise error(name, dtype)


def error(name: str, dtype: np.dtype) -> ModelLoadError:
    return ModelLoadError(f"tensor {name} holds infinity or NaN (as {np.dtype(dtype)})")
