"""Quantizes one weight while it is loaded: on the host a few channels at a time, or on a device.

Both take the checkpoint's numbers, compute in float32 and give the same bits (on a CPU).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.models import quantization

_CHANNELS = 64
"""Channels quantized at a time on the host; bounds the float32 copies."""


def on_host(weights: np.ndarray, kernel: np.ndarray, scale: np.ndarray) -> None:
    """weights [in, out] of any float dtype, maybe a view of a mapped file, into kernel [in, out]
    (int8 or float8_e4m3fn) and scale [out] float32."""
    for start in range(0, scale.shape[0], _CHANNELS):
        columns = slice(start, start + _CHANNELS)
        # rows are channels, which is how Hugging Face stores them
        channels = np.ascontiguousarray(weights[:, columns].T).astype(np.float32, copy=False)
        steps = quantization.step_of(np.abs(channels).max(axis=1), kernel.dtype, np)
        with np.errstate(invalid="ignore"):  # of infinity, which `check_finite` finds
            kernel[:, columns] = quantization.round_to(channels, steps[:, None], kernel.dtype, np).T
        scale[columns] = steps


def step(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The scale [*out], of `shape`, of weights [in, *out] that come in blocks of rows."""
    largest = np.zeros(shape, np.float32)
    for block in blocks:
        np.maximum(largest, np.abs(block.astype(np.float32)).max(axis=0), out=largest)
    return quantization.step_of(largest, dtype, np)


@functools.partial(jax.jit, static_argnames="dtype")
def on_device(weights: jax.Array, *, dtype: np.dtype[Any]) -> tuple[jax.Array, jax.Array]:
    """weights [in, *out] -> kernel of that shape in `dtype`, and scale [*out] float32. One program
    per shape."""
    return quantization.quantize(weights, dtype)


def check_finite(name: str, scale: jax.Array | np.ndarray) -> None:
    """Raises ModelLoadError when the weights behind `scale`, of tensor `name`, hold infinity or
    NaN."""
    if not np.isfinite(np.asarray(scale)).all():
        raise ModelLoadError(f"tensor {name} cannot be quantized: it holds infinity or NaN")
