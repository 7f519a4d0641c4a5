"""Where parameters go, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from jaxserve.errors import InvalidRequestError

Placement = Callable[[str], Sharding]
"""From a parameter's path to its sharding."""

_DTYPES = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}


def placement_for(sharding: Sharding | Placement | None) -> Placement:
    """None is the default device; one sharding serves every parameter; a function decides each."""
    if sharding is None:
        sharding = SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, Sharding):
        return lambda path: sharding
    return sharding


def on_cpu(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def resolve_dtype(dtype: str, sharding: Sharding) -> str:
    """ "auto" is float32 on CPU (where bfloat16 is emulated) and bfloat16 elsewhere, float16
    checkpoints included; other names stand for themselves. Raises InvalidRequestError."""
    if dtype == "auto":
        return "float32" if on_cpu(sharding) else "bfloat16"
    if dtype not in _DTYPES:
        names = ", ".join(("auto", *_DTYPES))
        raise InvalidRequestError(f"dtype must be one of {names}; got {dtype!r}")
    return _DTYPES[dtype]
