"""The plain meaning of all_reduce, for tests: NumPy float32, in the order of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np


def all_reduce(parts: Any) -> np.ndarray:
    """parts [n, B, D]: x of each rank. [B, D] float32, rounded to x's dtype."""
    parts = np.asarray(parts)
    return _sum(parts).astype(parts.dtype).astype(np.float32)


def all_reduce_add_norm(
    parts: Any, residual: Any, norm: Any, *, eps: float = 1e-6, rounded: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """See pallas_kernels.all_reduce_add_norm. Both results float32, the total rounded to x's dtype.
    rounded: the sum of the parts is too, before the residual is added."""
    parts = np.asarray(parts)
    summed = all_reduce(parts) if rounded else _sum(parts)
    total = summed + np.asarray(residual).astype(np.float32)
    total = total.astype(parts.dtype).astype(np.float32)
    rms = np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + np.float32(eps))
    return total, total / rms * np.asarray(norm).astype(np.float32)


def _sum(parts: np.ndarray) -> np.ndarray:
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total
