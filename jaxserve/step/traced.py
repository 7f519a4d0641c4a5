"""A user's functions as JAX traces them: what they compute, and what of it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError

MOST_CONSTANT_BYTES = 64 * 1024
"""Of arrays that a function closes over: they become part of every program."""


class Tracing:
    """The functions that one name is registered with."""

    def __init__(self, what: str, tables: Mapping[str, np.ndarray]) -> None:
        """what: names it in messages."""
        self._what = what
        self._digest = hashlib.sha256()
        for key, array in tables.items():
            self._digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())

    @property
    def digest(self) -> str:
        """Of what all functions so far compute, and the tables hold."""
        return self._digest.hexdigest()[:16]

    def made(self, name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
        """The jaxpr of the function `name`, and what it returns, abstract. InvalidRequestError: it
        cannot be traced, or closes over large arrays."""
        try:
            made, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
        except Exception as error:
            raise InvalidRequestError(
                f"{name} of {self._what} cannot be traced: {type(error).__name__}: {error}"
            ) from error
        constants = [np.asarray(x) for x in made.consts]
        size = sum(x.nbytes for x in constants)
        if size > MOST_CONSTANT_BYTES:
            raise InvalidRequestError(
                f"{name} of {self._what} closes over arrays of {size} bytes, more than "
                f"{MOST_CONSTANT_BYTES}: give them as tables={{name: array}} and read "
                "context.tables[name]"
            )
        text = jax.jit(function).lower(*arguments).as_text()
        self._digest.update(f"{name} {text}".encode())
        for constant in constants:  # which a version of JAX may keep out of the text
            self._digest.update(constant.tobytes())
        return made, result


def given_tables(params: Any, tables: Any) -> dict[str, np.ndarray]:
    """The arrays of `tables`. InvalidRequestError: they are none, or one of both is no dict."""
    for name, value in (("params", params), ("tables", tables)):
        if not isinstance(value, Mapping | None):
            raise InvalidRequestError(f"{name} must be a dict, got {checks.shown(value)}")
    return {key: _table(key, value) for key, value in (tables or {}).items()}


def _table(name: object, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if not isinstance(name, str) or array.dtype.kind not in "biuf" or not array.size:
        raise InvalidRequestError(
            f"tables[{checks.shown(name)}] must be an array of numbers, got {checks.shown(value)}"
        )
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
