"""The plain meaning of range_attention, for tests: NumPy float32, all scores at once."""

from __future__ import annotations

from typing import Any

import numpy as np


def range_attention(
    q: Any,
    k: Any,
    v: Any,
    starts: Any = None,
    ends: Any = None,
    *,
    most: int | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """See pallas_kernels.range_attention. Float32."""
    del most
    q, k, v = (np.asarray(x).astype(np.float32).swapaxes(1, 2) for x in (q, k, v))  # [B, N, S, H]
    scores = q @ k.swapaxes(2, 3) * np.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    if starts is not None:
        at = np.arange(q.shape[2])
        starts, ends = (np.asarray(x)[:, None, :, None] for x in (starts, ends))
        scores = np.where((at >= starts) & (at < ends), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    return (weights @ v).swapaxes(1, 2)
