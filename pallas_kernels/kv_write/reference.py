"""The plain meaning of kv_write, for tests: NumPy, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def kv_write(
    k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any
) -> tuple[np.ndarray, np.ndarray]:
    """See pallas_kernels.kv_write."""
    new_k, new_v = np.array(k_pages), np.array(v_pages)
    page_size = new_k.shape[1]
    for token, slot in enumerate(np.asarray(slots)):
        if slot < new_k.shape[0] * page_size:
            new_k[slot // page_size, slot % page_size] = np.asarray(k)[token]
            new_v[slot // page_size, slot % page_size] = np.asarray(v)[token]
    return new_k, new_v
