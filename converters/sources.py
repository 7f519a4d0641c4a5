"""Where tensors come from: the interface, and safetensors files."""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxserve.errors import ModelLoadError

INDEX_NAME = "model.safetensors.index.json"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100 << 20


class TensorSource(Protocol):
    """Tensors under their Hugging Face names, read one at a time."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, read-only (it may be a view of a mapped file)."""
        ...

    def close(self) -> None: ...


class SafetensorsFile:
    """One memory-mapped .safetensors file: 8 bytes of header length, JSON header, raw data.

    Raises ModelLoadError, naming the file, when header and length do not fit each other.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap raises ValueError on an empty file
            raise ModelLoadError(f"{path}: cannot be read as safetensors: {error}") from error
        try:
            self._tensors, self._data_start = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._map.close()
            raise ModelLoadError(f"{path}: damaged safetensors file: {error}") from error

    def _read_header(self) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
        size = len(self._map)
        if size < 8:
            raise ValueError(f"{size} bytes long, too short for a header")
        length = int.from_bytes(self._map[:8], "little")
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"its header claims {length} bytes; the file has {size}")
        header = json.loads(self._map[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {}
        data_size = size - 8 - length
        for name, entry in header.items():
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= data_size:
                raise ValueError(
                    f"tensor {name} should end at byte {8 + length + stop}, the file ends at {size}"
                )
            if dtype in _DTYPES and stop - start != _DTYPES[dtype].itemsize * math.prod(shape):
                raise ValueError(f"tensor {name}: {stop - start} bytes do not fit shape {shape}")
            tensors[name] = (dtype, shape, start)
        return tensors, 8 + length

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def read(self, name: str) -> np.ndarray:
        """A view of the mapped file. Raises ModelLoadError for anything but floats of 16 to 64
        bits (quantized checkpoints)."""
        code, shape, start = self._tensors[name]
        if code not in _DTYPES:
            raise ModelLoadError(
                f"{self.path}: tensor {name} has dtype {code}; supported: {', '.join(_DTYPES)}"
            )
        count = math.prod(shape)
        flat = np.frombuffer(self._map, _DTYPES[code], count, self._data_start + start)
        return flat.reshape(shape)

    def close(self) -> None:
        try:
            self._map.close()
        except BufferError:
            return  # a view is still alive; the map goes with it


class SafetensorsSource:
    """A Hugging Face folder: one .safetensors file, or shards with an index."""

    def __init__(self, folder: Path):
        self._where: dict[str, SafetensorsFile] = {}
        self._files = [SafetensorsFile(path) for path in _shard_paths(folder)]
        for file in self._files:
            for name in file.names():
                if name in self._where:
                    raise ModelLoadError(
                        f"tensor {name} is in both {self._where[name].path} and {file.path}"
                    )
                self._where[name] = file

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape(name)

    def read(self, name: str) -> np.ndarray:
        return self._where[name].read(name)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _shard_paths(folder: Path) -> list[Path]:
    """The files of the index, else model.safetensors, else every .safetensors of the folder."""
    index = folder / INDEX_NAME
    if not index.exists():
        single = folder / "model.safetensors"
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index}: damaged index: {error!r}") from error
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ModelLoadError(f"{index} names files that do not exist: {', '.join(missing)}")
    return paths
