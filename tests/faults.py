"""Failures put into the parts of a running engine."""

from __future__ import annotations

from typing import Any

import pytest


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, error: type[Exception]
) -> list[tuple[Any, ...]]:
    """Let call `number` (from 0) of a method raise; returns what it was called with, call by
    call."""
    real, calls = getattr(owner, name), []

    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) - 1 == number:
            raise error("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls
