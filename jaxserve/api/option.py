"""What values a constructor option takes, and their normal forms."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError

LONGEST_TEXT = 1 << 20
"""Characters; a chat template has a few thousand."""
LARGEST_SIZE = (1 << 31) - 1
"""Sizes and counts are int32 on the device."""
DTYPE_SPELLINGS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
"""Type objects of array libraries whose names are not SGLang's."""
LEVEL_SPELLINGS = {"warn": "warning", "fatal": "critical"}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """What values one option takes.

    kind: "text", "path" (or os.PathLike), "dtype" (a name, or a type object of NumPy, JAX or
    PyTorch), "level" (a name in any case), "flag", "integer", "number", "integers" (a list) or
    "json" (a JSON object, as text or dict). low, high: inclusive range. optional: whether None is
    allowed (it means "auto"). choices: the values implemented. known: values SGLang knows and
    jaxserve does not implement.
    """

    kind: str
    help: str
    low: float | None = None
    high: float | None = None
    optional: bool = False
    choices: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """The value in its normal form. Raises InvalidRequestError or NotSupportedError."""
        if value is None and self.optional:
            return None
        match self.kind:
            case "flag":
                return checks.boolean(name, value)
            case "integer":
                high = LARGEST_SIZE if self.high is None else int(self.high)
                return checks.integer(name, value, _whole(self.low), high)
            case "number":
                return checks.number(name, value, self.low, self.high)
            case "integers":
                return _integers(name, value)
            case "json":
                return _json_object(name, value)
            case "path":
                return self._chosen(name, _path(name, value))
            case "dtype":
                return self._chosen(name, _dtype_name(value))
            case "level" if isinstance(value, str):
                value = value.lower()
                return self._chosen(name, LEVEL_SPELLINGS.get(value, value))
        return self._chosen(name, value)

    def _chosen(self, name: str, value: Any) -> str:
        checks.text(name, value, LONGEST_TEXT)
        if value in self.known:
            raise NotSupportedError(
                f"{name}={value!r} is not supported yet; jaxserve has {', '.join(self.choices)}"
            )
        if self.choices and value not in self.choices:
            raise InvalidRequestError(
                f"{name} must be one of {', '.join(self.choices)}, got {checks.shown(value)}"
            )
        return value


def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object given as text or as a dict, parsed. Raises InvalidRequestError."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(checks.text(name, value, LONGEST_TEXT))
        except (ValueError, RecursionError) as error:  # ValueError: also of 4,300 digits
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(
                f"{name} is not valid JSON: {error}; got {checks.shown(value)}"
            ) from error
    if not isinstance(parsed, Mapping):
        raise InvalidRequestError(f"{name} must be a JSON object, got {checks.shown(value)}")
    return checks.json_value(name, parsed)


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def _integers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InvalidRequestError(
            f"{name} must be a list of positive integers, got {checks.shown(value)}"
        )
    return tuple(checks.integers(name, value, 1, checks.MOST_STRINGS))


def _json_object(name: str, value: Any) -> Any:
    """Text stays text, as it is what the attribute reads upstream."""
    parsed = json_object(name, value)
    return value if isinstance(value, str) else parsed


def _path(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and "\0" in value:
        raise InvalidRequestError(f"{name} has a NUL character, got {checks.shown(value)}")
    return value


def _dtype_name(value: Any) -> Any:
    """`bfloat16` of torch.bfloat16, jnp.bfloat16 or np.dtype("bfloat16"), without importing them;
    anything else as it is."""
    if isinstance(value, str):
        return value
    if type(value).__module__ == "torch":
        name = str(value).removeprefix("torch.")
    elif isinstance(value, type):
        # Python's own `float` has 64 bits, and SGLang's name "float" means 32.
        name = value if value.__module__ == "builtins" else value.__name__
    else:
        name = getattr(value, "name", value)
    return DTYPE_SPELLINGS.get(name, name) if isinstance(name, str) else value
