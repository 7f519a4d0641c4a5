"""An array that lies in a file as it is, read into memory of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from converters.files import OpenFile

_ROWS = 64
"""Rows read at a time where they are cast or transposed: both sides stay in the cache."""
_BYTES = 1 << 19
"""Or as many rows as make this many bytes."""


Check = Callable[[np.ndarray], None]
"""Looks at a contiguous block of rows, and raises what is wrong with it."""


def copy_block(block: np.ndarray, target: np.ndarray, check: Check | None) -> None:
    """`block`, contiguous, into `target` of any float dtype and strides, checked in that dtype."""
    if block.dtype != target.dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            block = block.astype(target.dtype)
    if check is not None:
        check(block)
    target[...] = block


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

    def read_into(
        self, out: np.ndarray, index: tuple[slice, ...] = (), check: Check | None = None
    ) -> None:
        """Fills `out` with `self[index]`. out: of that shape, any float dtype and strides. index: a
        slice without step for each axis, or for the first ones. check: called with each block of
        rows as `out` gets it, while it is in the cache (only where whole rows are read).

        Bytes go straight to `out` where it is contiguous and of the same dtype, else through a
        small buffer. Only what the index asks for is read where it cuts rows or columns.
        """
        sizes = self.shape or (1,)
        bounds = [part.indices(size)[:2] for part, size in zip(index, sizes, strict=False)]
        bounds += [(0, size) for size in sizes[len(bounds) :]]
        (first, last), rest = bounds[0], bounds[1:]
        out = out.reshape(1) if not self.shape else out
        width = math.prod(sizes[1:])
        whole = all(bound == (0, size) for bound, size in zip(rest, sizes[1:], strict=True))
        if whole:
            self._read_rows(out, first * width, check)
        elif len(rest) == 1:
            for row in range(first, last):
                self._read_rows(out[row - first], row * width + rest[0][0])
        else:
            out[...] = self.read()[index]
        self.file.check_unchanged()

    def _read_rows(self, out: np.ndarray, start: int, check: Check | None = None) -> None:
        """start: in elements."""
        at = self.offset + start * self.dtype.itemsize
        direct = out.dtype == self.dtype and out.flags.c_contiguous
        if direct and check is None:
            self.file.read_into(out, at)
            return
        row_bytes = math.prod(out.shape[1:]) * self.dtype.itemsize
        step = max(_ROWS, _BYTES // max(row_bytes, 1))
        buffer = None if direct else np.empty((min(step, len(out)), *out.shape[1:]), self.dtype)
        for row in range(0, len(out), step):
            target = out[row : row + step]
            block = target if buffer is None else buffer[: len(target)]
            self.file.read_into(block, at + row * row_bytes)
            if buffer is not None:
                copy_block(block, target, check)
            elif check is not None:
                check(block)
