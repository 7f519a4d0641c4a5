"""Values as error messages show them: short, whatever they are, and made in no time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np

LONGEST = 80
"""Characters of a value."""
MOST_ITEMS = 6
"""Of a list or dict."""
DEEPEST = 3
"""Lists within lists."""
MOST_BITS = 256
"""Python needs quadratic time for the digits of an integer, and refuses above 4,300 of them."""


def shown(value: Any) -> str:
    """A value's repr, shortened to 80 characters, and its type. Of long strings, large integers and
    collections only the beginning is looked at."""
    return f"{quoted(value)} ({type(value).__name__[:LONGEST]})"


def quoted(value: Any) -> str:
    """`shown` without the type, for names."""
    text = _repr(value, DEEPEST)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _repr(value: Any, levels: int) -> str:
    if isinstance(value, str | bytes | bytearray):
        return repr(value[:LONGEST])
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return _collection(value, "{}", lambda item: _item(value, item, levels), levels)
    if isinstance(value, list | tuple) or (isinstance(value, set | frozenset) and value):
        brackets = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        text = _collection(value, brackets, lambda item: _repr(item, levels - 1), levels)
        return f"{text[:-1]},)" if brackets == "()" and len(value) == 1 else text
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "OSU":
        return f"array({_repr(value.ravel()[: MOST_ITEMS + 1].tolist(), levels)})"
    try:
        return repr(value)
    except Exception as error:  # a repr may raise anything
        return f"a value whose repr raises {type(error).__name__}"


def _item(mapping: Mapping[Any, Any], key: Any, levels: int) -> str:
    return f"{_repr(key, levels - 1)}: {_repr(mapping[key], levels - 1)}"


def _collection(items: Any, brackets: str, show: Any, levels: int) -> str:
    if not levels:
        return f"{brackets[0]}...{brackets[1]}" if len(items) else brackets
    parts = [show(item) for item in islice(items, MOST_ITEMS)]
    if len(items) > MOST_ITEMS:
        parts.append("...")
    return f"{brackets[0]}{', '.join(parts)}{brackets[1]}"
