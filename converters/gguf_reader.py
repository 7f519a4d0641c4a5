"""The container of a GGUF file: metadata, and the table of its tensors.

Parsed here, without the gguf package: that one takes seconds over a vocabulary of 50,000 tokens
(this: tens of milliseconds) and answers a truncated file with errors from inside NumPy.
Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Counts and lengths are checked against
the file's size, and against what real models have, before anything of that size is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.files import OpenFile, open_named
from converters.messages import plain
from converters.stored_array import StoredArray
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.shown import quoted

_VERSIONS = (2, 3)
_SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_HEADER = 256 << 20
"""Bytes. A vocabulary of 250,000 tokens with its merges takes 20 MB."""
_MAX_STRINGS = 2_000_000
"""Keys, names and elements of arrays of strings; each takes up to 100 bytes beyond its text."""
_MAX_TENSORS = 100_000
_MAX_NAME = 65_535
"""Bytes of a key or a name, as the format has it for keys."""
_STEP = 1 << 20
"""Bytes of the header that are read at a time, at least."""
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_REQUIRED: Any = object()

F32, F16, BF16 = 0, 1, 30
"""Tensor types that hold plain numbers; every other one that we read is quantized."""


_TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


def type_name(type_id: int) -> str:
    """ggml's name of a tensor type, or its number."""
    return _TYPE_NAMES.get(type_id, str(type_id))


class TensorInfo(NamedTuple):
    """One row of the tensor table."""

    shape: tuple[int, ...]
    """Outermost dimension first, as in NumPy and Hugging Face (GGUF stores the reverse)."""
    type_id: int
    """ggml_type: F32, F16, BF16 or a quantized one."""
    offset: int
    """In bytes, from the start of the file."""


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What stands before the tensor data."""

    path: str
    """Of the file that was read."""
    size: int
    """Bytes."""
    metadata: dict[str, Any]
    """Numeric arrays are NumPy, strings `str`; a float32 scalar is the shortest decimal that rounds
    to it (1e-05, not 9.999999747378752e-06)."""
    tensors: dict[str, TensorInfo]
    """By name, in the file's order."""

    @classmethod
    def open(cls, path: str) -> GGUFFile:
        """Reads the header. Raises ModelLoadError, naming the file, when it is missing, truncated
        or no GGUF file, NotSupportedError for other versions and for split files."""
        with open_named(Path(path)) as file:
            return cls.read(file)

    @classmethod
    def read(cls, file: OpenFile) -> GGUFFile:
        """The same of a file that is open."""
        return _Header(str(file.path), file).parse()

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """An integer of the metadata. Raises ModelLoadError when it is missing (without a default)
        or of another type; so do the other accessors."""
        return self._value(key, int, "an integer", default)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value(key, (int, float), "a number", default)
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, bool, "a boolean", default)

    def string(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, str, "a string", default)

    def strings(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, list, "a list of strings", default)

    def numbers(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._value(key, np.ndarray, "a list of numbers", default)

    def _value(self, key: str, kind: Any, what: str, default: Any) -> Any:
        if key not in self.metadata:
            if default is _REQUIRED:
                raise ModelLoadError(f"{self.path}: metadata key {plain(key)} is missing")
            return default
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            given = quoted(value) if isinstance(value, (int, float, str)) else type(value).__name__
            raise ModelLoadError(
                f"{self.path}: metadata key {plain(key)} must be {what}, got {given}"
            )
        return value

    def read_floats(self, name: str) -> np.ndarray:
        """A small float32 tensor, without the gguf package. Raises ModelLoadError."""
        info = self.tensors[name]
        if info.type_id != F32:
            raise ModelLoadError(
                f"{self.path}: tensor {name} must be F32, is {type_name(info.type_id)}"
            )
        self.check_extent(name, 4 * math.prod(info.shape))
        with open_named(Path(self.path)) as file:
            return StoredArray(file, info.offset, info.shape, np.dtype("<f4")).read()

    def check_extent(self, name: str, size: int) -> None:
        """Raises ModelLoadError unless the file has all `size` bytes of the tensor."""
        end = self.tensors[name].offset + size
        if end > self.size:
            raise ModelLoadError(
                f"{self.path}: truncated GGUF file: tensor {plain(name)} ends at byte {end}, the "
                f"file has only {self.size}"
            )


class _Header:
    """A cursor over the file's start that checks each read against the file's end."""

    def __init__(self, path: str, file: OpenFile):
        self.path = path
        self.file = file
        self.size = file.size
        self.data = bytearray()
        self.at = 0
        self.strings = 0

    def parse(self) -> GGUFFile:
        self._reserve(min(4, self.size), "the magic")
        if self.data[:4] != b"GGUF":
            raise ModelLoadError(f"{self.path}: not a GGUF file: it does not start with b'GGUF'")
        self.at = 4
        version = self._unsigned(_U32, "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "a big-endian file" if swapped else f"version {version}"
            raise NotSupportedError(f"{self.path}: GGUF {what} is not supported; versions: 2, 3")
        tensor_count = self._unsigned(_U64, "the tensor count")
        pair_count = self._unsigned(_U64, "the metadata count")
        metadata: dict[str, Any] = {}
        for index in range(pair_count):
            key = self._name(f"metadata key {index + 1} of {pair_count}")
            if key in metadata:
                raise self._damaged(f"metadata key {plain(key)} occurs twice")
            metadata[key] = self._value(f"metadata key {plain(key)}")
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise NotSupportedError(
                f"{self.path}: one of {parts} parts of a split GGUF model; join them first with "
                "llama.cpp's `llama-gguf-split --merge`"
            )
        tensors = self._tensor_table(tensor_count, metadata)
        return GGUFFile(self.path, self.size, metadata, tensors)

    def _tensor_table(self, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
        rows: dict[str, TensorInfo] = {}
        if count > _MAX_TENSORS:
            raise self._damaged(f"it claims {count:,} tensors; at most {_MAX_TENSORS:,} are read")
        for index in range(count):
            what = f"entry {index + 1} of {count} of the tensor table"
            name = self._name(what)
            dims = self._unsigned(_U32, what)
            if name in rows or dims > _MAX_DIMS:
                why = "occurs twice" if name in rows else f"claims {dims} dimensions"
                raise self._damaged(f"tensor {plain(name)} {why}")
            shape = tuple(self._unsigned(_U64, what) for _ in range(dims))[::-1]
            if 0 in shape or not shape:
                raise self._damaged(f"tensor {plain(name)} has shape {shape}")
            rows[name] = TensorInfo(shape, self._unsigned(_U32, what), self._unsigned(_U64, what))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment={quoted(alignment)} is not a power of two")
        start = -(-self.at // alignment) * alignment
        tensors = {name: row._replace(offset=start + row.offset) for name, row in rows.items()}
        for name, row in tensors.items():
            if row.offset >= self.size:
                raise ModelLoadError(
                    f"{self.path}: truncated GGUF file: tensor {plain(name)} starts at byte "
                    f"{row.offset}, the file has only {self.size}"
                )
        return tensors

    def _value(self, what: str) -> Any:
        kind = self._unsigned(_U32, what)
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        value = self._numbers(kind, 1, what)[0]
        return float(str(value)) if value.dtype == np.float32 else value.item()

    def _array(self, what: str) -> Any:
        kind, count = self._unsigned(_U32, what), self._unsigned(_U64, what)
        if kind != _STRING:
            return self._numbers(kind, count, what)
        self._reserve(8 * count, what)  # before a damaged count makes us loop for hours
        found: list[str] = []
        while len(found) < count:
            found += self._buffered_strings(count - len(found))
            if len(found) < count:
                found.append(self._string(what))
        return found

    def _buffered_strings(self, most: int) -> list[str]:
        """The next good strings that lie in `data` whole, at most `most`; `_string` reads on, or
        says what is wrong. (A vocabulary and its merges are 200,000: a call of it for each would be
        a tenth of loading a small model.)"""
        most = min(most, _MAX_STRINGS - self.strings)
        data, at, end = self.data, self.at, len(self.data)
        found: list[str] = []
        with contextlib.suppress(UnicodeDecodeError):
            while len(found) < most and at + _U64.size <= end:
                start = at + _U64.size
                stop = start + _U64.unpack_from(data, at)[0]
                if stop > end:
                    break
                found.append(data[start:stop].decode())
                at = stop
        self.at = at
        self.strings += len(found)
        return found

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self._damaged(f"{what} has unknown value type {kind}")
        start = self._reserve(dtype.itemsize * count, what)
        self.at += dtype.itemsize * count
        return np.frombuffer(bytes(self.data[start : self.at]), dtype, count)

    def _name(self, what: str) -> str:
        name = self._string(what)
        if len(name) > _MAX_NAME:
            raise self._damaged(f"{what} is {len(name):,} characters long")
        return name

    def _string(self, what: str) -> str:
        self.strings += 1
        if self.strings > _MAX_STRINGS:
            raise self._damaged(f"it has more than {_MAX_STRINGS:,} strings before the tensors")
        length = self._unsigned(_U64, what)
        start = self._reserve(length, what)
        self.at += length
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8") from error

    def _unsigned(self, code: struct.Struct, what: str) -> int:
        start = self._reserve(code.size, what)
        self.at += code.size
        return code.unpack_from(self.data, start)[0]

    def _reserve(self, size: int, what: str) -> int:
        """The cursor, when `size` bytes follow it; they are then in `data`."""
        end = self.at + size
        if end <= len(self.data):
            return self.at
        if end > self.size:
            raise ModelLoadError(
                f"{self.path}: truncated or damaged GGUF file: {what} ends at byte {end}, the file "
                f"has only {self.size}"
            )
        if end > _MAX_HEADER:
            raise self._damaged(
                f"{what} ends at byte {end:,}; what stands before the tensors may have "
                f"{_MAX_HEADER:,}"
            )
        have = len(self.data)
        more = min(max(end - have, have, _STEP), self.size - have)
        self.data += self.file.read(have, more)
        return self.at

    def _damaged(self, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: damaged GGUF file: {why}")
