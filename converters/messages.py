"""What a model file says, shown in an error: short, printable, and on one line."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.shown import quoted

_LONGEST = 120
"""Characters of one name or value."""
_MOST = 20
"""Names of one list."""


def plain(name: str) -> str:
    """A name as it is where it is short and printable, else as `shown.quoted`."""
    return name if len(name) <= _LONGEST and name.isprintable() else quoted(name)


def some_of(items: Iterable[str], separator: str = ", ") -> str:
    """The first 20 `items`, "and N more" behind them, or "nothing"."""
    items = list(items)
    parts = [item if len(item) <= 3 * _LONGEST else quoted(item) for item in items[:_MOST]]
    if len(items) > _MOST:
        parts.append(f"and {len(items) - _MOST:,} more")
    return separator.join(parts) or "nothing"
