"""Checks of single values given by the user. Every failure names the parameter and the value."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from jaxserve.errors import InvalidRequestError


def shown(value: Any) -> str:
    """A value as error messages show it: its repr, shortened, and its type."""
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return f"{text} ({type(value).__name__})"


def near_matches(name: Any, known: Iterable[str]) -> str:
    """`" (did you mean 'x' or 'y'?)"`, or an empty string when nothing resembles `name`."""
    matches = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int within [low, high]; bools, floats and strings are refused."""
    result = value
    if type(value) is not int:  # asking an abstract class takes longer than all the rest
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InvalidRequestError(f"{name} must be an integer, got {shown(value)}")
        result = operator.index(value)
    if (low is not None and result < low) or (high is not None and result > high):
        raise InvalidRequestError(f"{name} must be {_interval(low, high)}, got {result}")
    return result


def number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
) -> float:
    """`value` as a finite float within [low, high], or (low, high] with `above`."""
    if type(value) not in (float, int) and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise InvalidRequestError(f"{name} must be a number, got {shown(value)}")
    result = float(value)
    too_low = low is not None and (result <= low if above else result < low)
    if not math.isfinite(result) or too_low or (high is not None and result > high):
        raise InvalidRequestError(
            f"{name} must be finite{_and_interval(low, high, above)}, got {value}"
        )
    return result


def boolean(name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be True or False, got {shown(value)}")
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A string or a sequence of strings as a tuple; empty strings are refused."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise InvalidRequestError(
            f"{name} must be a string or a list of strings, got {shown(value)}"
        )
    if not all(items):
        raise InvalidRequestError(f"{name} must not contain an empty string, got {shown(value)}")
    return tuple(items)


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
