"""The one place that reads JSON of a model: bounded, and with errors that name file, key, value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters import files
from converters.messages import plain
from jaxserve.errors import ModelLoadError
from jaxserve.shown import quoted

MAX_BYTES = 32 << 20
_MAX_ELEMENTS = 1_000_000
"""Brackets and commas. An element takes up to 300 bytes once parsed, however short it is."""
_REQUIRED: Any = object()


class JsonObject:
    """A JSON object whose values are checked as they are asked for.

    where: the file, and the keys that lead to this object. The accessors raise ModelLoadError for
    a value of another type or out of range, and for a missing one unless there is a default (null
    counts as missing then).
    """

    def __init__(self, where: str, values: dict[str, Any]):
        self.where = where
        self.values = values

    def string(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, str, "a string", default)

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """From -2**63 to 2**63 - 1."""
        return self._value(key, int, "an integer of 64 bits", default)

    def list_of(self, key: str, kind: type, what: str, default: Any = _REQUIRED) -> Any:
        """what: the elements' kind in words, for the message."""
        values = self._value(key, list, f"a list of {what}", default)
        for value in values or ():
            if not _is(value, kind):
                raise self._wrong(key, f"a list of {what}", value, "holds")
        return values

    def object(self, key: str) -> JsonObject:
        value = self._value(key, dict, "an object", _REQUIRED)
        return JsonObject(f"{self.where}: {plain(key)}", value)

    def _value(self, key: str, kind: type, what: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if key not in self.values:
            raise ModelLoadError(f"{self.where}: {plain(key)} is missing")
        if not _is(value, kind):
            raise self._wrong(key, what, value, "is")
        return value

    def _wrong(self, key: str, what: str, value: Any, verb: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self.where}: {plain(key)} must be {what}, {verb} {quoted(value)}"
            f" ({type(value).__name__})"
        )


def read(folder: Path, name: str) -> JsonObject:
    """The JSON object in a file of a model folder. Raises ModelLoadError."""
    return parse(files.read_inside(folder, name, limit=MAX_BYTES), str(folder / name))


def parse(text: bytes, where: str) -> JsonObject:
    """The JSON object in `text` (UTF-8). where: the file, for the messages.

    Raises ModelLoadError, which shows nothing of the text, for anything else, and for text that
    would take much longer to parse, or much more memory, than those of real models do.
    """
    elements = sum(text.count(mark) for mark in (b"{", b"[", b","))
    if len(text) > MAX_BYTES or elements > _MAX_ELEMENTS:
        raise ModelLoadError(
            f"{where}: cannot be read as JSON: {len(text):,} bytes with {elements:,} elements; at "
            f"most {MAX_BYTES:,} and {_MAX_ELEMENTS:,} are read"
        )
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ModelLoadError(f"{where}: cannot be read as JSON: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ModelLoadError(
            f"{where}: cannot be read as JSON: byte {error.start} is not UTF-8"
        ) from None
    except ValueError as error:
        raise ModelLoadError(f"{where}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where}: should hold a JSON object, holds {type(value).__name__}")
    return JsonObject(where, value)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    if isinstance(value, int) and kind is int:
        return -(2**63) <= value < 2**63
    return isinstance(value, kind)
