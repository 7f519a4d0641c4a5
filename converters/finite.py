"""Whether weights are numbers, asked while they are copied to where they stay.

On the host a block is checked while it is in the cache. A sum of squares tells in one pass whether
float32 holds infinity or NaN; it overflows with finite numbers too, and then each is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.errors import ModelLoadError

_EXPONENT = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}
"""All ones in infinity and NaN."""


def checking(name: str) -> Callable[[np.ndarray], None]:
    """What looks at each block of the tensor `name`, contiguous and in the dtype that it will have:
    raises ModelLoadError where that holds infinity or NaN."""

    def check(block: np.ndarray) -> None:
        if not all_finite(block):
            raise error(name, block.dtype)

    return check


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


def error(name: str, dtype: np.dtype) -> ModelLoadError:
    return ModelLoadError(f"tensor {name} holds infinity or NaN (as {np.dtype(dtype)})")
