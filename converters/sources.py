"""Where tensors come from: the interface, and safetensors files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from converters import files, json_files
from converters.json_files import JsonObject
from converters.messages import plain, some_of
from converters.shards import Tensor
from converters.stored_array import StoredArray
from jaxserve.errors import ModelLoadError
from jaxserve.shown import quoted

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class TensorSource(Protocol):
    """Tensors under their Hugging Face names. Reading raises ModelLoadError."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor:
        """Raises ModelLoadError for anything but floats."""
        ...

    def close(self) -> None: ...


class SafetensorsFile:
    """One .safetensors file: 8 bytes of header length, JSON header, raw data.

    Raises ModelLoadError, naming the file, when header and length do not fit each other, or the
    header is larger than json_files allows (room for 100,000 tensors).
    """

    def __init__(self, folder: Path, name: str):
        self._file = files.open_inside(folder, name)
        self.path = self._file.path
        try:
            self._tensors = self._read_header()
        except ModelLoadError:
            self.close()
            raise

    def _read_header(self) -> dict[str, tuple[str, StoredArray]]:
        size = self._file.size
        if size < 8:
            raise self._damaged(f"{size} bytes long, too short for a header")
        length = int.from_bytes(self._file.read(0, 8), "little")
        if length > size - 8:
            raise self._damaged(f"its header claims more bytes than the {size - 8:,} that follow")
        if length > json_files.MAX_BYTES:
            raise self._damaged(f"its header is longer than {json_files.MAX_BYTES:,} bytes")
        header = json_files.parse(self._file.read(8, length), f"{self.path}: damaged header")
        data = 8 + length
        return {
            name: self._entry(header.object(name), data, size)
            for name in header.values
            if name != "__metadata__"
        }

    def _entry(self, entry: JsonObject, data: int, size: int) -> tuple[str, StoredArray]:
        code = entry.string("dtype")
        shape = tuple(entry.list_of("shape", int, "integers"))
        offsets = entry.list_of("data_offsets", int, "integers")
        if any(length < 0 for length in shape) or len(shape) > 8:
            raise ModelLoadError(f"{entry.where}: shape {quoted(list(shape))} is impossible")
        if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= size - data:
            raise ModelLoadError(
                f"{entry.where}: data_offsets {quoted(offsets)} do not lie within the "
                f"{size - data} bytes of data that the file has"
            )
        length = offsets[1] - offsets[0]
        dtype = _DTYPES.get(code, np.dtype(np.uint8))
        if code in _DTYPES and length != dtype.itemsize * math.prod(shape):
            raise ModelLoadError(
                f"{entry.where}: {length} bytes do not fit shape {list(shape)} of {code}"
            )
        return code, StoredArray(self._file, data + offsets[0], shape, dtype)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1].shape

    def tensor(self, name: str) -> StoredArray:
        """Raises ModelLoadError for anything but floats of 16 to 64 bits (quantized ones)."""
        code, stored = self._tensors[name]
        if code not in _DTYPES:
            raise ModelLoadError(
                f"{self.path}: tensor {plain(name)} has dtype {plain(code)}; supported: "
                f"{', '.join(_DTYPES)}"
            )
        return stored

    def close(self) -> None:
        self._file.close()

    def _damaged(self, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: damaged safetensors file: {why}")


class SafetensorsSource:
    """A Hugging Face folder: one .safetensors file, or shards with an index."""

    def __init__(self, folder: Path):
        self._where: dict[str, SafetensorsFile] = {}
        self._files: list[SafetensorsFile] = []
        try:
            for name in shard_names(folder):
                self._add(SafetensorsFile(folder, name))
        except ModelLoadError:
            self.close()
            raise

    def _add(self, file: SafetensorsFile) -> None:
        self._files.append(file)
        for name in file.names():
            if name in self._where:
                raise ModelLoadError(
                    f"tensor {plain(name)} is in both {self._where[name].path} and {file.path}"
                )
            self._where[name] = file

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape(name)

    def tensor(self, name: str) -> StoredArray:
        return self._where[name].tensor(name)

    def close(self) -> None:
        for file in self._files:
            file.close()


def shard_names(folder: Path) -> list[str]:
    """The files of the index, else model.safetensors, else every .safetensors of the folder.

    Raises ModelLoadError where the index is damaged, or names what is no file of the folder.
    """
    if not files.has(folder, INDEX_NAME):
        single = files.has(folder, SINGLE_NAME)
        return [SINGLE_NAME] if single else files.entries(folder, ".safetensors")
    names = indexed_names(folder)
    missing = [plain(name) for name in names if not files.has(folder, name)]
    if missing:
        raise ModelLoadError(
            f"{folder / INDEX_NAME} names files that do not exist: {some_of(missing)}"
        )
    return names


def indexed_names(folder: Path) -> list[str]:
    """The plain names of the files that the folder's index names. Raises ModelLoadError."""
    index = json_files.read(folder, INDEX_NAME)
    weight_map = index.object("weight_map")
    found = {weight_map.string(tensor) for tensor in weight_map.values}
    try:
        return sorted(files.plain_name(name) for name in found)
    except ModelLoadError as error:
        raise ModelLoadError(f"{weight_map.where}: {error}") from None
