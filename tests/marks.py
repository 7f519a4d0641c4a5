"""Which cases of a matrix `make test` runs; `make check` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of one parameter, those marked `long` that are not among `kept`: themselves, or the
    names of what has one."""
    cases = list(cases)
    names = [getattr(case, "name", case) for case in cases]
    assert set(kept) <= set(names), "a case that there is not"
    return [
        case if name in kept else pytest.param(case, marks=pytest.mark.long)
        for case, name in zip(cases, names, strict=True)
    ]


def long(*values: Any, id: str | None = None) -> Any:
    """A case of one or several parameters, marked `long`."""
    return pytest.param(*values, marks=pytest.mark.long, id=id)
