"""Values of a config.json, read with their types and ranges checked.

Every failure is a ModelLoadError that names the key and the value. Numbers are checked as what they
are used as: int32 and float32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.shown import quoted

logger = logging.getLogger(__name__)
MOST_INT = 2**31 - 1


def bad(key: str, must: str, value: Any) -> ModelLoadError:
    """The error of a key whose value is none that it can have."""
    return ModelLoadError(f"config.json: {key} must be {must}, got {quoted(value)}")


def size(hf: Mapping[str, Any], key: str, default: int | None = None, most: int = MOST_INT) -> int:
    """An integer from 1 to `most`; an absent key or null takes the default."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise bad(key, "a positive integer", value)
    if value > most:
        raise bad(key, f"at most {most}", value)
    return value


def number(
    hf: Mapping[str, Any],
    key: str,
    default: float | None = None,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
) -> float:
    """A number that is finite in float32, at least `least` and more than `above`, both in float32;
    an absent key or null takes the default."""
    value = hf.get(key)
    value = default if value is None else value
    must = "a finite number" + (f", at least {least:g}" if least > -math.inf else "")
    must += f" above {above:g}" if above > -math.inf else ""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise bad(key, must, value)
    try:
        with np.errstate(over="ignore", under="ignore"):
            used = np.float32(value)
    except OverflowError:  # an integer of hundreds of digits
        raise bad(key, must, value) from None
    if not (np.isfinite(used) and used >= np.float32(least) and used > np.float32(above)):
        raise bad(key, must, value)
    return float(value)


def numbers(hf: Mapping[str, Any], key: str, *, above: float) -> tuple[float, ...]:
    """A list of numbers, each as `number` takes them."""
    value = hf.get(key)
    if not isinstance(value, (list, tuple)):
        raise bad(key, "a list of numbers", value)
    return tuple(number({key: each}, key, above=above) for each in value)


def flag(hf: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false; an absent key or null takes the default. ("false" would be true in Python.)"""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise bad(key, "true or false", value)
    return value


def text(hf: Mapping[str, Any], key: str, default: str) -> str:
    """A string; an absent key or null takes the default."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, str):
        raise bad(key, "a string", value)
    return value


def strings(hf: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings; empty where the key is absent or null."""
    value = hf.get(key)
    value = [] if value is None else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise bad(key, "a list of strings", value)
    return list(value)


def table(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object, copied; empty where the key is absent or null."""
    value = hf.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise bad(key, "an object", value)
    return dict(value)


def token_ids(
    hf: Mapping[str, Any], key: str, vocab_size: int, file: str = "config.json"
) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple without repetition. Ids outside the vocabulary
    can never come: they are left out, and a warning is logged. file: for messages."""
    value = hf.get(key)
    ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
        raise ModelLoadError(
            f"{file}: {key} must be a token id or a list of token ids, got {quoted(value)}"
        )
    known = tuple(dict.fromkeys(id_ for id_ in ids if 0 <= id_ < vocab_size))
    if len(known) < len(set(ids)):
        logger.warning(
            "%s: %s=%s has ids outside the vocabulary of %d tokens; they are left out",
            file,
            key,
            quoted(value),
            vocab_size,
        )
    return known
