"""The prompts of one call: how many, which token ids, which request ids. Checked, not submitted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, JaxserveError

MOST_REQUESTS = 1 << 20
"""Of one call: prompts x n. Each is about 2 kB before it runs."""


class Prompts(NamedTuple):
    """What a call is to continue. Either of texts and ids is None."""

    single: bool
    """One prompt (the result is a dict), not a list of them."""
    texts: Sequence[Any] | None
    """As given, one a prompt; not encoded, and not checked, yet."""
    ids: Sequence[Any] | None
    """Rows of token ids, as given."""

    @property
    def count(self) -> int:
        return len(self.ids if self.texts is None else self.texts)  # pyright: ignore

    @classmethod
    def of(cls, prompt: Any, input_ids: Any) -> Prompts:
        """From a call's arguments. Where both are given, the ids are what runs, as upstream; the
        texts must be as many. Raises InvalidRequestError."""
        if input_ids is None:
            if prompt is None:
                raise InvalidRequestError("prompt and input_ids are both None; give one of them")
            single, texts = _texts(prompt)
            return cls(single, texts, None)
        single, rows = _id_rows(input_ids)
        if prompt is not None:
            single_text, texts = _texts(prompt)
            if (single_text, len(texts)) != (single, len(rows)):
                raise InvalidRequestError(
                    f"prompt and input_ids differ in shape: prompt is {_shape(single_text, texts)},"
                    f" input_ids is {_shape(single, rows)}"
                )
        return cls(single, None, rows)


def _texts(prompt: Any) -> tuple[bool, Sequence[Any]]:
    """Whether there is one prompt, and the prompts."""
    prompt = checks.listed(checks.plain(prompt))
    if isinstance(prompt, str):
        return True, [prompt]
    if isinstance(prompt, list | tuple):
        return False, prompt
    raise InvalidRequestError(
        f"prompt must be a string or a list of strings, got {checks.shown(prompt)}"
    )


def _id_rows(input_ids: Any) -> tuple[bool, Any]:
    """Whether there is one row of token ids, and the rows."""
    rows = input_ids
    if not isinstance(rows, np.ndarray) or not rows.ndim:
        rows = checks.listed(rows)
        if not isinstance(rows, list | tuple):
            raise InvalidRequestError(
                "input_ids must be a list of token ids or a list of such lists, got "
                + checks.shown(input_ids)
            )
    if not len(rows):
        raise InvalidRequestError("input_ids is empty, got []")
    first = rows[0]
    nested = isinstance(first, list | tuple) or getattr(first, "ndim", 0) > 0
    return not nested, rows if nested else [rows]


def _shape(single: bool, rows: Sequence[Any]) -> str:
    return "one prompt" if single else f"a list of {len(rows)}"


def check_count(prompts: int, n: int, most_queued: int | None) -> None:
    """Raises InvalidRequestError for more requests than a call may have, before any is made.
    most_queued: the option max_queued_requests, where the call that exceeds it is refused."""
    total = prompts * n
    if most_queued is not None and total > most_queued:
        raise InvalidRequestError(
            f"the queue is full: max_queued_requests={most_queued}, and the call has {total} "
            f"requests ({prompts} prompts, n={n})"
        )
    if total > MOST_REQUESTS:
        raise InvalidRequestError(
            f"a call may have {MOST_REQUESTS} requests, got {total} ({prompts} prompts, n={n})"
        )


def check_prompts(prompts: list[Any]) -> None:
    """Raises InvalidRequestError unless each prompt is a non-empty string."""
    for row, prompt in enumerate(prompts):
        where = f"prompt {row} of the batch" if len(prompts) > 1 else "prompt"
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"{where} must be a string, got {checks.shown(prompt)}")
        if not prompt:
            raise InvalidRequestError(f"{where} is empty, got ''")


def request_ids(rid: Any, prompts: int, single: bool, n: int) -> list[list[str]]:
    """The request ids of each prompt's n samples, all different.

    A string with a batch becomes rid_0, rid_1, ...; with n > 1 the samples of a prompt get _0,
    _1, ... behind its id, so that aborting the given id (a prefix) ends all of them.
    """
    if rid is None:
        return [[os.urandom(16).hex() for _ in range(n)] for _ in range(prompts)]
    if isinstance(rid, str):
        checks.text("rid", rid)
        given = [rid] if single else [f"{rid}_{row}" for row in range(prompts)]
    elif isinstance(rid, list | tuple | np.ndarray):
        given = per_row("rid", rid, prompts)
    else:
        raise InvalidRequestError(f"rid must be a string or a list, got {checks.shown(rid)}")
    for row, item in enumerate(given):
        name = "rid" if isinstance(rid, str) else f"rid[{row}]"
        if not isinstance(item, str) or not item:
            raise InvalidRequestError(
                f"{name} must be a non-empty string, got {checks.shown(item)}"
            )
        checks.text(name, item)
    if n > 1:
        samples = [[f"{item}_{sample}" for sample in range(n)] for item in given]
    else:
        samples = [[item] for item in given]
    seen: set[str] = set()
    for name in (name for names in samples for name in names):
        if name in seen:
            raise InvalidRequestError(f"Duplicate request ID: {checks.quoted(name)} is given twice")
        seen.add(name)
    return samples


def per_row(name: str, value: Any, prompts: int) -> list[Any]:
    """A value for each prompt: a list (or array) as it is, if its length fits, anything else
    repeated."""
    value = checks.listed(value)
    if not isinstance(value, list | tuple):
        return [value] * prompts
    if len(value) != prompts:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries for {prompts} prompts; the lengths must match"
        )
    return list(value)


def cache_salts(value: Any, prompts: int) -> list[str]:
    """The cache salt of each prompt; None is none, the same as an empty one."""
    if value is None:
        return [""] * prompts
    if isinstance(value, str):
        return [checks.text("cache_salt", value)] * prompts
    if not isinstance(value, list | tuple | np.ndarray):
        raise InvalidRequestError(
            f"cache_salt must be a string or a list of strings, got {checks.shown(value)}"
        )
    return [
        "" if salt is None else checks.text(f"cache_salt[{row}]", salt)
        for row, salt in enumerate(per_row("cache_salt", value, prompts))
    ]


class NamingRow:
    """Errors inside say which row of a batch they are about."""

    __slots__ = ("batch", "index")

    def __init__(self, index: int, batch: bool) -> None:
        self.index = index
        self.batch = batch

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.batch and isinstance(error, JaxserveError):
            raise type(error)(f"in row {self.index} of the batch: {error}") from error
