"""The prompts of one call: how many, which token ids, which request ids. Checked, not submitted."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from jaxserve.api import checks
from jaxserve.errors import InvalidRequestError

SHORT = 1024
"""Up to so many token ids are checked in a third of the time without an array."""


def is_single(prompt: Any, input_ids: Any) -> bool:
    """Whether a call is for one prompt (its result is a dict) and not for a list of them."""
    if prompt is not None and input_ids is not None:
        raise InvalidRequestError("prompt and input_ids are both given; give exactly one of them")
    if prompt is not None:
        if isinstance(prompt, str):
            return True
        if isinstance(prompt, list | tuple):
            return False
        raise InvalidRequestError(
            f"prompt must be a string or a list of strings, got {checks.shown(prompt)}"
        )
    if input_ids is None:
        raise InvalidRequestError("prompt and input_ids are both None; give exactly one of them")
    if isinstance(input_ids, np.ndarray):
        return input_ids.ndim == 1
    if not isinstance(input_ids, list | tuple):
        raise InvalidRequestError(
            "input_ids must be a list of token ids or a list of such lists, got "
            + checks.shown(input_ids)
        )
    if not len(input_ids):
        raise InvalidRequestError("input_ids is empty, got []")
    return not isinstance(input_ids[0], list | tuple | np.ndarray)


def check_prompts(prompts: list[Any]) -> None:
    """Raises InvalidRequestError unless each prompt is a non-empty string."""
    for row, prompt in enumerate(prompts):
        where = f"prompt {row} of the batch" if len(prompts) > 1 else "prompt"
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"{where} must be a string, got {checks.shown(prompt)}")
        if not prompt:
            raise InvalidRequestError(f"{where} is empty, got ''")


def token_ids(name: str, values: Any, vocab_size: int) -> list[int]:
    """A row of token ids as a list of ints, every one of them in [0, vocab_size)."""
    if not isinstance(values, list | tuple | np.ndarray):
        raise InvalidRequestError(f"{name} must be a list of token ids, got {checks.shown(values)}")
    if not len(values):
        raise InvalidRequestError(f"{name} is empty, got []")
    short = type(values) is list and len(values) <= SHORT and set(map(type, values)) == {int}
    if short and min(values) >= 0 and max(values) < vocab_size:
        return list(values)
    try:
        array: Any = np.asarray(values)
    except (ValueError, OverflowError):  # ragged rows, integers of more than 64 bits
        array = np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidRequestError(f"{name} must be a list of integers, got {checks.shown(values)}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        raise InvalidRequestError(
            f"{name} contains {int(array[outside][0])}, which is outside the vocabulary of "
            f"{vocab_size} tokens"
        )
    return array.tolist()


def request_ids(rid: Any, prompts: int, single: bool, n: int) -> list[list[str]]:
    """The request ids of each prompt's n samples, all different.

    A string with a batch becomes rid_0, rid_1, ...; with n > 1 the samples of a prompt get _0,
    _1, ... behind its id, so that aborting the given id (a prefix) ends all of them.
    """
    if rid is None:
        return [[os.urandom(16).hex() for _ in range(n)] for _ in range(prompts)]
    if isinstance(rid, str):
        given = [rid] if single else [f"{rid}_{row}" for row in range(prompts)]
    elif isinstance(rid, list | tuple):
        given = list(rid)
        if len(given) != prompts:
            raise InvalidRequestError(
                f"rid has {len(given)} request ids for {prompts} prompts; the lengths must match"
            )
    else:
        raise InvalidRequestError(f"rid must be a string or a list, got {checks.shown(rid)}")
    for item in given:
        if not isinstance(item, str) or not item:
            raise InvalidRequestError(f"rid must be a non-empty string, got {checks.shown(item)}")
    if n > 1:
        samples = [[f"{item}_{sample}" for sample in range(n)] for item in given]
    else:
        samples = [[item] for item in given]
    seen: set[str] = set()
    for name in (name for names in samples for name in names):
        if name in seen:
            raise InvalidRequestError(f"Duplicate request ID: {name!r} is given twice")
        seen.add(name)
    return samples


def per_row(name: str, value: Any, prompts: int) -> list[Any]:
    """A value for each prompt: a list as it is, if its length fits, anything else repeated."""
    if not isinstance(value, list | tuple):
        return [value] * prompts
    if len(value) != prompts:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries for {prompts} prompts; the lengths must match"
        )
    return list(value)


def cache_salts(value: Any, prompts: int) -> list[str]:
    """The cache salt of each prompt; None is none, the same as an empty one."""
    salts = per_row("cache_salt", value, prompts)
    for salt in salts:
        if salt is not None and not isinstance(salt, str):
            raise InvalidRequestError(
                f"cache_salt must be a string or a list of strings, got {checks.shown(salt)}"
            )
    return [salt or "" for salt in salts]
