"""The parameters of a chain: names, types, defaults, and one request's as two vectors. No jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError

MOST_NUMBERS = 4096
"""Of one request's parameters: they are sent when it is admitted, and kept for every slot."""


class ParamSpec:
    """Numbers and small arrays by name, kept as a float32 and an int32 vector for each slot."""

    def __init__(
        self, defaults: Mapping[str, Any], ranges: Mapping[str, tuple[Any, Any]] | None = None
    ) -> None:
        """defaults: int (or bool) values stay int32, others are float32. ranges: as of
        `transforms.Transform`. InvalidRequestError: a name or a value that is none, or more than
        MOST_NUMBERS numbers."""
        self._ranges = dict(ranges or {})
        self.defaults = {name: _array(name, value) for name, value in defaults.items()}
        """Arrays of float32 or int32, of the shapes that requests may fill."""
        total = sum(value.size for value in self.defaults.values())
        if total > MOST_NUMBERS:
            raise InvalidRequestError(
                f"params has {total} numbers; at most {MOST_NUMBERS} fit (larger arrays are "
                "`tables`)"
            )
        floats = sum(x.size for x in self.defaults.values() if x.dtype == np.float32)
        # never none: XLA crashes at arrays without elements in programs for several GPUs (0.11.2)
        self.floats = max(floats, 1)
        """F, numbers of the float32 vector, at least one."""
        self.ints = max(total - floats, 1)
        """I, numbers of the int32 vector, at least one."""

    def pack(self, given: Mapping[str, Any], of: str) -> tuple[np.ndarray, np.ndarray]:
        """A request's floats [F] and ints [I]: `given` values, the parameter `of`, over the
        defaults. An array may be smaller than its default, and keeps the default's numbers behind.
        InvalidRequestError."""
        for name in given:
            if name not in self.defaults:
                raise InvalidRequestError(
                    f"{of} has {checks.quoted(name)}, which is not registered with it"
                    f"{checks.near_matches(name, self.defaults)}"
                )
        floats, ints = np.zeros(self.floats, np.float32), np.zeros(self.ints, np.int32)
        for name, place in self.unpack(floats, ints).items():
            place[...] = self.defaults[name]
            if name in given:
                _fill(f"{of}[{name!r}]", place, given[name], *self._ranges.get(name, (None, None)))
        return floats, ints

    def unpack(self, floats: Any, ints: Any) -> dict[str, Any]:
        """By name again, of vectors (or tracers) [F] and [I]."""
        taken = {np.dtype(np.float32): 0, np.dtype(np.int32): 0}
        found = {}
        for name, default in self.defaults.items():
            vector = floats if default.dtype == np.float32 else ints
            start = taken[default.dtype]
            taken[default.dtype] = stop = start + default.size
            found[name] = vector[start:stop].reshape(default.shape)
        return found


def _array(name: object, value: Any) -> np.ndarray:
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidRequestError(f"params has the name {checks.shown(name)}: expected a word")
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or not array.size:
        raise InvalidRequestError(
            f"params[{name!r}] must be a number or an array of numbers, got {checks.shown(value)}"
        )
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    limits = np.iinfo(np.int32)
    if array.min() < limits.min or array.max() > limits.max:
        raise InvalidRequestError(
            f"params[{name!r}] must have integers of 32 bits, got {checks.shown(value)}"
        )
    return array.astype(np.int32)


def _fill(name: str, target: np.ndarray, value: Any, low: Any, high: Any) -> None:
    """Write a number of [low, high], or lists that are as deep as `target` and nowhere longer."""
    if target.ndim:
        value = checks.listed(value)
        if not isinstance(value, list | tuple) or len(value) > len(target):
            raise InvalidRequestError(
                f"{name} must be a list of at most {len(target)}, got {checks.shown(value)}"
            )
        for index, each in enumerate(value):
            part = target[index : index + 1].reshape(target.shape[1:])
            _fill(f"{name}[{index}]", part, each, low, high)
    elif target.dtype == np.float32:
        target[...] = checks.number(name, value, low, high)
    else:
        value = checks.plain(value)
        flag = int(value) if isinstance(value, bool) else value
        limits = np.iinfo(np.int32)
        low, high = (limits.min if low is None else low), (limits.max if high is None else high)
        target[...] = checks.integer(name, flag, low, high)
