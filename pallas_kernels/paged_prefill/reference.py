"""The plain meaning of paged_prefill, for tests: each new token is a row of paged_decode."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.paged_decode import reference


def paged_prefill(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    q_starts: Any,
    q_lens: Any,
    prefix_lens: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> np.ndarray:
    """See pallas_kernels.paged_prefill. Returns float32 [T, N, H], zeros in rows of no sequence."""
    out = np.zeros(q.shape, np.float32)
    for row, (start, count, prefix) in enumerate(
        zip(np.asarray(q_starts), np.asarray(q_lens), np.asarray(prefix_lens), strict=True)
    ):
        if count:
            out[start : start + count] = reference.paged_decode(
                np.asarray(q)[start : start + count],
                k_pages,
                v_pages,
                np.broadcast_to(np.asarray(page_table)[row], (count, page_table.shape[1])),
                prefix + 1 + np.arange(count),
                scale=scale,
                window=window,
            )
    return out
