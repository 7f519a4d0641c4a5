"""What the columns of JSON rows hold: one type for all rows, as Parquet wants it."""

from __future__ import annotations

import base64
from typing import Any

TEXT, FLAG, INTEGER, NUMBER, JSON, NATIVE = "text", "flag", "integer", "number", "json", "native"
"""JSON: lists, dicts and mixtures, written as JSON text. NATIVE: a Parquet column, as it is."""
NULL = "null"
INT64 = 1 << 63
KINDS = {str: TEXT, bool: FLAG, int: INTEGER, float: NUMBER, type(None): NULL}


def kind_of(value: Any) -> str:
    """Of one JSON value."""
    kind = KINDS.get(type(value), JSON)
    return JSON if kind == INTEGER and not -INT64 <= value < INT64 else kind


def common(one: str, other: str) -> str:
    """The kind that holds values of both."""
    if one == other or other == NULL:
        return one
    if one == NULL:
        return other
    return NUMBER if {one, other} == {INTEGER, NUMBER} else JSON


def plain(value: Any) -> Any:
    """What JSON has no form for (columns of Parquet): bytes as base64, others as their text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)
