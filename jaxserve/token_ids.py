"""Rows of token ids, as callers give them. No jax."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError

SHORT = 1024
"""Up to so many token ids are checked in a third of the time without an array."""


def token_ids(name: str, values: Any, vocab_size: int) -> list[int]:
    """A row of token ids as a list of ints, every one of them in [0, vocab_size)."""
    short = type(values) is list and len(values) <= SHORT and set(map(type, values)) == {int}
    if short and min(values) >= 0 and max(values) < vocab_size:
        return list(values)
    array: Any = values
    if not isinstance(values, np.ndarray) or values.dtype == object:
        array = _flat(name, checks.listed(values))
    if not array.size:
        raise InvalidRequestError(f"{name} is empty, got []")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidRequestError(f"{name} must be a list of integers, got {checks.shown(values)}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        raise InvalidRequestError(
            f"{name} contains {int(array[outside][0])}, which is outside the vocabulary of "
            f"{vocab_size} tokens"
        )
    return array.tolist()


def _flat(name: str, values: Any) -> np.ndarray:
    """A list of integers (or arrays without dimensions) as an array."""
    if not isinstance(values, list | tuple):
        raise InvalidRequestError(f"{name} must be a list of token ids, got {checks.shown(values)}")
    for kind in set(map(type, values)):
        # Lists within are not NumPy's to look at: it would follow them to any depth.
        if not issubclass(kind, numbers.Integral) and not hasattr(kind, "ndim"):
            raise InvalidRequestError(
                f"{name} must be a list of integers, got {checks.shown(values)}"
            )
    try:
        return np.asarray(values)
    except Exception as error:  # ragged arrays, freed buffers, whatever `__array__` raises
        raise InvalidRequestError(
            f"{name} must be a list of integers, got {checks.shown(values)}"
        ) from error
