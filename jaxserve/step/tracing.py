"""What helps to trace a program."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Cycles stay for as long as the block takes. Tracing makes so many objects that looking for
    them is a sixth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function under its program's name, which traces and dumps show."""

    def program(*args: Any) -> Any:
        return function(*args)

    program.__name__ = name
    return program
