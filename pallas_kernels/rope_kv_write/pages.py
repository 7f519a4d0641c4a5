"""How numbers are rounded to the dtype of the pages, shared by the implementations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

FP8 = jnp.float8_e4m3fn


def to_pages(x: jax.Array, dtype: Any) -> jax.Array:
    """x in the pages' dtype. float8_e4m3fn has no infinity and turns what is too large into NaN, so
    x is clipped to its largest number, 448, before."""
    if dtype != FP8:
        return x.astype(dtype)
    largest = float(jnp.finfo(FP8).max)
    return jnp.clip(x.astype(jnp.float32), -largest, largest).astype(dtype)
