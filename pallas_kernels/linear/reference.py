"""The plain meaning of linear, for tests: NumPy float32, without intermediate rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def activation(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp of a large number is inf, and 1 / inf the 0 meant
        if name == "silu":
            return x / (1.0 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "gelu_pytorch_tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        erf = np.vectorize(math.erf, otypes=[np.float32])
        return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))
    raise ValueError(f"act={name!r}")


def linear(
    x: Any,
    w: Any,
    bias: Any = None,
    norm: Any = None,
    residual: Any = None,
    scale: Any = None,
    *,
    eps: float = 1e-6,
    act: str | None = None,
    transposed: bool = False,
) -> np.ndarray:
    """See pallas_kernels.linear. Returns float32 [M, N']."""
    x, w = np.asarray(x).astype(np.float32), np.asarray(w).astype(np.float32)
    if norm is not None:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
        x = x * np.asarray(norm).astype(np.float32)
    out = x @ (w.T if transposed else w)
    if scale is not None:
        out = out * np.asarray(scale)
    if bias is not None:
        out = out + np.asarray(bias).astype(np.float32)
    if act is not None:
        gate, up = np.split(out, 2, axis=-1)
        out = activation(act, gate) * up
    if residual is not None:
        out = out + np.asarray(residual).astype(np.float32)
    return out.astype(np.float32)
