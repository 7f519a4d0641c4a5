"""Weight-only quantization of linear layers: a byte a weight, a float32 step an output channel.

    w [in, *out]  ~  kernel [in, *out] * kernel_scale [*out]
    kernel_scale = max over in of |w| / largest,   kernel = round(w / kernel_scale)

Symmetric, rounded to nearest even. fp8 is float8_e4m3fn (largest 448; Micikevicius et al. 2022),
w8a16_int8 is int8 (largest 127, so that -w is as good as w; Wu et al. 2020). Activations stay as
they are. The functions take NumPy arrays with xp=np, and give the same bits as with JAX's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.errors import NotSupportedError

_E4M3, _INT8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8)
SCHEMES: Mapping[str, np.dtype[Any]] = MappingProxyType({"fp8": _E4M3, "w8a16_int8": _INT8})
"""Name of the engine's option `quantization` -> dtype of the kernels."""
_LARGEST = {_E4M3: 448.0, _INT8: 127.0}
_NOTHING = 2.0**-100
"""A channel whose weights are all smaller counts as zero: 1 / step must not overflow."""


def kernel_dtype(scheme: str) -> np.dtype[Any]:
    """The dtype behind a scheme's name. Raises NotSupportedError for one that does not exist."""
    if scheme not in SCHEMES:
        raise NotSupportedError(
            f"quantization={scheme!r} is not supported; use None or one of {', '.join(SCHEMES)}"
        )
    return SCHEMES[scheme]


def step_of(largest: Any, dtype: np.dtype[Any], xp: Any = jnp) -> Any:
    """max |w| of each channel -> its step, float32; 1 for channels of zeros, and infinity or NaN
    where a weight was that."""
    # products with reciprocals: XLA would turn the division by a constant into one anyway
    step = largest * np.float32(1 / _LARGEST[dtype])
    return xp.where(largest < _NOTHING, np.float32(1), step)


def round_to(w: Any, step: Any, dtype: np.dtype[Any], xp: Any = jnp) -> Any:
    """float32 w / step in `dtype`; step broadcasts. Clipped before the conversion: 448 * (1 + eps)
    is NaN in float8_e4m3fn beyond 464, and int8 wraps around."""
    most = np.float32(_LARGEST[dtype])
    scaled = xp.clip(w * (np.float32(1) / step), -most, most)
    return (xp.rint(scaled) if dtype == _INT8 else scaled).astype(dtype)


def quantize(w: jax.Array, dtype: np.dtype[Any]) -> tuple[jax.Array, jax.Array]:
    """w [in, *out] of any float dtype -> kernel [in, *out] in `dtype`, kernel_scale [*out]
    float32."""
    w = w.astype(jnp.float32)
    step = step_of(jnp.abs(w).max(axis=0), dtype)
    # XLA's max on a CPU drops NaN in long reductions (jax 0.10.2)
    step = jnp.where(jnp.isfinite(w).all(axis=0), step, jnp.nan)
    return round_to(w, step, dtype), step
