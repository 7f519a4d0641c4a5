"""What a model file says, shown in an error: short, printable, and on one line."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

_LONGEST = 120
"""Characters of one name or value."""
_MOST = 20
"""Names of one list."""


def shown(value: Any) -> str:
    """`repr(value)`, cut to 120 characters. Containers are named by type and length, because
    their repr may be as long as the file."""
    if isinstance(value, (list, tuple, dict, set)):
        text = repr(value) if len(value) <= 4 and all(map(_is_short, value)) else None
        text = text or f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, int) and value.bit_length() > 256:
        # Python refuses to print integers of more than 4,300 digits.
        text = f"an integer of {value.bit_length()} bits"
    elif isinstance(value, (str, bytes)):
        text = repr(value[: _LONGEST + 1])
    else:
        text = repr(value)
    if len(text) <= _LONGEST:
        return text
    length = f" ({len(value)} long)" if isinstance(value, Sized) else ""
    return f"{text[:_LONGEST]}...{length}"


def plain(name: str) -> str:
    """A name as it is where it is short and printable, else as `shown`."""
    return name if len(name) <= _LONGEST and name.isprintable() else shown(name)


def some_of(items: Iterable[str], separator: str = ", ") -> str:
    """The first 20 `items`, "and N more" behind them, or "nothing"."""
    items = list(items)
    parts = [item if len(item) <= 3 * _LONGEST else shown(item) for item in items[:_MOST]]
    if len(items) > _MOST:
        parts.append(f"and {len(items) - _MOST:,} more")
    return separator.join(parts) or "nothing"


def _is_short(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, str)) and len(shown(value)) < 60)
