"""An array that lies in a file as it is, read into memory of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from converters.files import OpenFile

_ROWS = 64
"""Rows read at a time where they are cast or transposed: both sides stay in the cache."""
_BYTES = 1 << 19
"""Or as many rows as make this many bytes."""


Check = Callable[[np.ndarray], None]
"""Looks at a contiguous block of rows, and raises what is wrong with it."""


def checked(block: np.ndarray, dtype: np.dtype[Any], check: Check | None) -> np.ndarray:
    """A contiguous block of any float dtype in `dtype`, checked as such."""
    if block.dtype != dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            block = block.astype(dtype)
    if check is not None:
        check(block)
    return block


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file, read in parts. Reading raises ModelLoadError where the file was written
    to since it was opened."""

    file: OpenFile
    """Open."""
    offset: int
    """Of the first element, in bytes."""
    shape: tuple[int, ...]
    """[rows, ...], C order."""
    dtype: np.dtype[Any]
    """As stored."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All of it, in an array of its own."""
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray, first: int = 0, check: Check | None = None) -> None:
        """Fills `out`, of any float dtype and strides, with the rows from `first` on. check: called
        with each block of rows as `out` gets it, while it is in the cache.

        Bytes go straight to `out` where it is contiguous and of the same dtype, else through a
        small buffer.
        """
        out = out.reshape(1) if not self.shape else out
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        if direct and check is None:
            self.file.read_into(out, self.offset + first * self._row_bytes)
        else:
            for row, block in self._blocks(first, first + len(out), out if direct else None):
                block = checked(block, out.dtype, check)
                if not direct:
                    out[row - first : row - first + len(block)] = block
        self.file.check_unchanged()

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows, a few at a time, each block in the memory of the one before."""
        for _, block in self._blocks(0, self.shape[0], None):
            yield block
        self.file.check_unchanged()

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _blocks(
        self, first: int, last: int, out: np.ndarray | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Rows a few at a time behind the number of the first, in `out` or a buffer."""
        step = max(_ROWS, _BYTES // max(self._row_bytes, 1))
        shape = (min(step, last - first), *self.shape[1:])
        buffer = np.empty(shape, self.dtype) if out is None else out
        for row in range(first, last, step):
            begin, count = 0 if out is None else row - first, min(step, last - row)
            block = buffer[begin : begin + count]
            self.file.read_into(block, self.offset + row * self._row_bytes)
            yield row, block
