"""Attention over a paged KV cache, and what stands around it: one folder per operation, several
implementations of each.

Nothing here knows of the engine. Letters: T packed tokens, B rows, P pages, S page size, W page
table width, N query heads, K KV heads, G = N/K, H head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.add_norm.api import OPERATION as _ADD_NORM
from pallas_kernels.add_norm.api import add_norm
from pallas_kernels.all_reduce.api import OPERATION as _ALL_REDUCE
from pallas_kernels.all_reduce.api import all_reduce, all_reduce_add_norm
from pallas_kernels.device import Device, current_device
from pallas_kernels.kv_write.api import OPERATION as _KV_WRITE
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.linear.api import OPERATION as _LINEAR
from pallas_kernels.linear.api import linear, runs_as_one_kernel
from pallas_kernels.paged_decode.api import OPERATION as _PAGED_DECODE
from pallas_kernels.paged_decode.api import decode_implementation, paged_decode
from pallas_kernels.paged_prefill.api import OPERATION as _PAGED_PREFILL
from pallas_kernels.paged_prefill.api import paged_prefill
from pallas_kernels.paged_prefill.plan import FIXED_TILE
from pallas_kernels.range_attention.api import OPERATION as _RANGE_ATTENTION
from pallas_kernels.range_attention.api import range_attention
from pallas_kernels.registry import Operation
from pallas_kernels.rope_kv_write.api import OPERATION as _ROPE_KV_WRITE
from pallas_kernels.rope_kv_write.api import rope_kv_write
from pallas_kernels.sample.adjust import adjust
from pallas_kernels.sample.api import OPERATION as _SAMPLE
from pallas_kernels.sample.api import Drawn, SampleRows, SlotLists, sample

__all__ = [
    "FIXED_TILE",
    "Device",
    "Drawn",
    "SampleRows",
    "SlotLists",
    "add_norm",
    "adjust",
    "all_reduce",
    "all_reduce_add_norm",
    "available_implementations",
    "current_device",
    "decode_implementation",
    "kv_write",
    "linear",
    "operations",
    "paged_decode",
    "paged_prefill",
    "range_attention",
    "rope_kv_write",
    "runs_as_one_kernel",
    "sample",
]


def operations() -> dict[str, Operation]:
    """Every operation, by name."""
    known = (
        _PAGED_DECODE,
        _PAGED_PREFILL,
        _RANGE_ATTENTION,
        _KV_WRITE,
        _ROPE_KV_WRITE,
        _LINEAR,
        _ADD_NORM,
        _SAMPLE,
        _ALL_REDUCE,
    )
    return {entry.name: entry for entry in known}


def available_implementations(
    operation: str, dtype: Any = np.float32, device: Device | None = None
) -> tuple[str, ...]:
    """Names that `operation` tries by default, in order, for arrays of `dtype` on `device` (None:
    JAX's default device). Raises ValueError for an unknown operation."""
    known = operations()
    if operation not in known:
        raise ValueError(f"operation={operation!r}: known are {', '.join(known)}")
    return known[operation].order(device or current_device(), np.dtype(dtype))
