"""Checks of single values given by the user. Every failure names the parameter and the value."""

from __future__ import annotations

import difflib
import itertools
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxserve.errors import InvalidRequestError
from jaxserve.shown import quoted, shown

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
"""The smallest normal number. XLA may take anything nearer to zero for zero."""
MOST_STRINGS = 1024
"""In one list of stop strings or patterns."""
LONGEST_STRING = 65_536
"""Characters of a stop string, a pattern, a request id or a cache salt."""
LONGEST_NAME = 128
"""Of names that are compared with the known ones."""
DEEPEST = 64
"""Levels of lists and dicts inside each other, in a value that is JSON."""


__all__ = [
    "absent",
    "boolean",
    "encodable",
    "integer",
    "integers",
    "json_value",
    "listed",
    "near_matches",
    "number",
    "plain",
    "quoted",
    "shown",
    "strings",
    "text",
]


def plain(value: Any) -> Any:
    """A scalar or 0-d array of NumPy, JAX or PyTorch as the Python value it holds, anything else
    as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except Exception:  # a buffer that was freed, say: the value is none of ours then
            return value
    return value


def listed(value: Any) -> Any:
    """An array of NumPy, JAX or PyTorch (of any device) as a list, nested as its dimensions,
    anything else as it is."""
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
        try:
            return value.tolist()
        except Exception:  # as in `plain`
            return value
    return value


def absent(value: Any, levels: int = DEEPEST) -> bool:
    """Whether a value says "not given": None, False, an empty collection, or a list of such values
    (`[[]]`, `[None, None]`)."""
    if value is None or value is False:
        return True
    if isinstance(value, Mapping | set | frozenset):
        return not value
    if isinstance(value, list | tuple):
        return levels > 0 and all(absent(item, levels - 1) for item in value)
    if isinstance(value, np.bool_):
        return not value
    if isinstance(value, np.ndarray):
        return value.size == 0 or (value.dtype == object and absent(value.tolist(), levels))
    return False


def near_matches(name: Any, known: Iterable[str]) -> str:
    """`" (did you mean 'x' or 'y'?)"`, or an empty string when nothing resembles `name`."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        return ""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int within [low, high]; bools, floats and strings are refused."""
    result = value
    if type(value) is not int:  # asking an abstract class takes longer than all the rest
        result = plain(value)
        if isinstance(result, bool) or not isinstance(result, numbers.Integral):
            raise InvalidRequestError(f"{name} must be an integer, got {shown(value)}")
        result = operator.index(result)
    if (low is not None and result < low) or (high is not None and result > high):
        raise InvalidRequestError(f"{name} must be {_interval(low, high)}, got {shown(result)}")
    return result


def number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
) -> float:
    """`value` as a float within [low, high], or (low, high] with `above`, that is finite as the
    float32 it becomes on the device. A positive one that float32 has no normal number for is the
    smallest one where zero is not allowed, and zero elsewhere."""
    result = value
    if type(value) not in (float, int):
        result = plain(value)
        if isinstance(result, bool) or not isinstance(result, numbers.Real):
            raise InvalidRequestError(f"{name} must be a number, got {shown(value)}")
    try:
        result = float(result)
    except OverflowError:
        result = float("inf")
    too_low = low is not None and (result <= low if above else result < low)
    if not -FLOAT32_MAX <= result <= FLOAT32_MAX or too_low or (high is not None and result > high):
        raise InvalidRequestError(
            f"{name} must be finite in float32{_and_interval(low, high, above)}, got {shown(value)}"
        )
    if -FLOAT32_TINY < result < FLOAT32_TINY and result:
        return FLOAT32_TINY if above else 0.0
    return result


def boolean(name: str, value: Any) -> bool:
    """`value` if it is True or False, of Python or as a 0-d array."""
    result = plain(value)
    if not isinstance(result, bool):
        raise InvalidRequestError(f"{name} must be True or False, got {shown(value)}")
    return result


def text(name: str, value: Any, most: int = LONGEST_STRING) -> str:
    """A string of at most `most` characters that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, got {shown(value)}")
    if len(value) > most:
        raise InvalidRequestError(
            f"{name} may have {most} characters, got {len(value)}: {shown(value)}"
        )
    return encodable(name, value)


def name(name: str, value: Any) -> str:
    """A string with something in it."""
    value = text(name, value)
    if not value:
        raise InvalidRequestError(f"{name} must not be empty, got ''")
    return value


def encodable(name: str, value: str) -> str:
    """`value` if UTF-8 can encode it: no half of a surrogate pair is in it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{name} has half of a surrogate pair at character {error.start}: {shown(value)}"
            ) from error
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A string or a sequence of at most MOST_STRINGS strings as a tuple; empty strings are
    refused."""
    items = (value,) if isinstance(value, str) else listed(value)
    if not isinstance(items, list | tuple):
        raise InvalidRequestError(
            f"{name} must be a string or a list of strings, got {shown(value)}"
        )
    if len(items) > MOST_STRINGS:
        raise InvalidRequestError(
            f"{name} may have {MOST_STRINGS} strings, got {len(items)}: {shown(value)}"
        )
    for item in items:
        if not isinstance(item, str):
            raise InvalidRequestError(
                f"{name} must be a string or a list of strings, got {shown(value)}"
            )
        if not item:
            raise InvalidRequestError(
                f"{name} must not contain an empty string, got {shown(value)}"
            )
        text(name, item)
    return tuple(items)


def integers(name: str, values: Any, low: int, most: int) -> list[int]:
    """At most `most` integers of at least `low` from a list, an array or an iterator; None among
    them is left out. An iterator is not followed further than that."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise InvalidRequestError(f"{name} must be a list of token ids, got {shown(values)}")
    if getattr(values, "ndim", 1) == 0:
        raise InvalidRequestError(f"{name} must be a list of token ids, got {shown(values)}")
    try:
        items = list(itertools.islice(values, most + 1))
    except Exception as error:  # whatever a caller's iterator raises
        raise InvalidRequestError(
            f"{name} must be a list of token ids, and {shown(values)} raised "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from error
    if len(items) > most:
        raise InvalidRequestError(f"{name} may have {most} ids, got more: {shown(values)}")
    return [integer(name, item, low) for item in items if item is not None]


def json_value(name: str, value: Any, levels: int = DEEPEST) -> Any:
    """A copy of a value that JSON can express (keys may be integers too), with lists for tuples and
    sets and Python's numbers for NumPy's. Raises InvalidRequestError for other types, and for more
    than `levels` lists and dicts inside each other."""
    if levels < 0:
        raise InvalidRequestError(f"{name} has more than {DEEPEST} levels of lists and dicts")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise InvalidRequestError(f"{name} has the key {shown(key)}, which is no string")
        return {key: json_value(name, item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(name, item, levels - 1) for item in value]
    value = plain(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InvalidRequestError(f"{name} must be JSON, got {shown(value)}")


def _interval(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high}"
    return f"at least {low}" if high is None else f"in [{low}, {high}]"


def _and_interval(low: float | None, high: float | None, above: bool) -> str:
    if low is None:
        return ""
    if high is None:
        return f" and {'above' if above else 'at least'} {low:g}"
    return f" and in {'(' if above else '['}{low:g}, {high:g}]"
