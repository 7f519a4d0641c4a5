"""JSONL: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxserve import checks
from jaxserve.batch import kinds
from jaxserve.batch.rows import Part, Row, Scan
from jaxserve.errors import InvalidRequestError

SAMPLE = 1000
"""Rows at the beginning in which columns are looked for."""
BOM = b"\xef\xbb\xbf"


def scan(path: str, stride: int, all_kinds: bool) -> Scan:
    """Counts the lines that are not blank. all_kinds: parses each of them, for its columns' kinds.
    Raises InvalidRequestError for a file without any JSON object."""
    columns: dict[str, str] = {}
    offsets: list[int] = []
    rows = position = objects = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.isspace():
                if not rows % stride:
                    offsets.append(position)
                rows += 1
                objects += line.removeprefix(BOM).lstrip().startswith(b"{")
                if all_kinds or rows <= SAMPLE:
                    _note(columns, line)
            position += len(line)
    if not objects:
        raise InvalidRequestError(
            f"input {path!r} is no JSONL file: none of its {rows} lines is a JSON object "
            '(as in {"prompt": "Hello"})'
        )
    return Scan(rows, offsets, stride, columns)


def read(part: Part) -> list[Row]:
    """The rows of a part."""
    with open(part.path, "rb") as file:
        file.seek(part.begin)
        content = file.read(part.end - part.begin)
    lines = [line for line in content.split(b"\n") if line and not line.isspace()]
    return [
        _row(part.index + number, part.first + number, line) for number, line in enumerate(lines)
    ]


def line(values: Mapping[str, Any]) -> bytes:
    """A row of output as UTF-8, in escapes where it has half of a surrogate pair."""
    try:
        return json.dumps(values, default=kinds.plain, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values, default=kinds.plain).encode() + b"\n"


def _row(index: int, number: int, line: bytes) -> Row:
    try:
        values = _parse(line)
    except (ValueError, RecursionError) as error:
        return Row(index, {}, f"row {number} of the file is no JSON: {error}; got {_shown(line)}")
    if not isinstance(values, dict):
        return Row(index, {}, f"row {number} of the file is no JSON object; got {_shown(line)}")
    return Row(index, values)


def _note(columns: dict[str, str], line: bytes) -> None:
    """Adds what a line has; a broken one has nothing."""
    try:
        values = _parse(line)
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        for name, value in values.items():
            kind = kinds.kind_of(value)
            columns[name] = kinds.common(columns.get(name, kinds.NULL), kind)


def _parse(line: bytes) -> Any:
    return json.loads(line.removeprefix(BOM))


def _shown(line: bytes) -> str:
    return checks.shown(line[:1000].decode("utf-8", "backslashreplace"))
