"""The plain meaning of add_norm, for tests: NumPy float32."""

from __future__ import annotations

from typing import Any

import numpy as np


def add_norm(x: Any, y: Any, norm: Any, *, eps: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """See pallas_kernels.add_norm. Both results float32, the total rounded to x's dtype."""
    dtype = np.asarray(x).dtype
    x, y, norm = (np.asarray(array).astype(np.float32) for array in (x, y, norm))
    total = (x + y).astype(dtype).astype(np.float32)
    rms = np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + np.float32(eps))
    return total, total / rms * norm
