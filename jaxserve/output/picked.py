"""Rows of a step's array that were copied to the host, found by their places in it. No jax."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Places = Mapping[str, Sequence[tuple[int, int]]]
"""By the name of a payload, (step, row) of a step's results."""


class Picked(NamedTuple):
    """What goes to the host of one array: the rows that somebody asked for, or all of it."""

    pieces: tuple[Any, ...]
    """Arrays [N, ...], on their way to the host; where `rows` is None one, as the step has it."""
    rows: Sequence[int] | None
    """Which rows of the array the pieces have, ascending, one piece after the other (behind the
    last there may be others); None: all. Of n steps with B rows, row b of step s is s * B + b."""
    width: int
    """B; 0 of an array [T, ...]."""

    def on_host(self) -> HostRows:
        """Waits for the copies."""
        pieces = [np.asarray(piece) for piece in self.pieces]
        if self.rows is None and self.width:
            pieces = [piece.reshape(-1, *piece.shape[2:]) for piece in pieces]
        return HostRows(pieces, self.rows, self.width)


class HostRows:
    """The same on the host."""

    __slots__ = ("_first", "_pieces", "_rows", "_width")

    def __init__(
        self, pieces: list[np.ndarray], rows: Sequence[int] | None, width: int, first: int = 0
    ) -> None:
        """first: what row 0 is called."""
        self._pieces = pieces
        self._rows = rows
        self._width = width
        self._first = first

    def __getitem__(self, step: int) -> HostRows:
        """Of one of the n steps."""
        return HostRows(self._pieces, self._rows, self._width, step * self._width)

    def blocks(self, start: int, count: int) -> list[np.ndarray]:
        """Views [k, ...] of the rows start..start + count - 1, in order. They are all there."""
        place = start + self._first
        if self._rows is not None:
            place = bisect.bisect_left(self._rows, place)
        found = []
        for piece in self._pieces:
            if count and place < len(piece):
                found.append(piece[place : place + count])
                count -= len(found[-1])
                place = 0
            else:
                place -= min(len(piece), place)
        return found


def on_host(array: Any) -> Any:
    """What extras read of an array of a step's results. Waits for it."""
    return array.on_host() if isinstance(array, Picked) else np.asarray(array)
