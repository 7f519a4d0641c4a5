"""Where the patches of packed pictures lie, on the host. NumPy alone.

A picture's patches come in blocks of merge x merge, those that become one token, by rows of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.media.picture import Shape


class Places(NamedTuple):
    """Of each patch, in the order in which they come: [P] int32."""

    rows: np.ndarray
    """From the top of its picture."""
    columns: np.ndarray
    """From its left."""


def places(shapes: Sequence[Shape], merge: int, patches: int) -> Places:
    """Of pictures side by side and padding, whose row and column are 0."""
    found = Places(np.zeros(patches, np.int32), np.zeros(patches, np.int32))
    start = 0
    for shape in shapes:
        end = start + shape.patches
        for into, line in zip(found, np.indices((shape.height, shape.width)), strict=True):
            blocks = line.reshape(shape.height // merge, merge, shape.width // merge, merge)
            into[start:end] = np.tile(blocks.swapaxes(1, 2).reshape(-1), shape.tiles)
        start = end
    return found


def ranges(lengths: Sequence[int], patches: int) -> tuple[np.ndarray, np.ndarray]:
    """The first of the patches that each sees, and the one behind the last, both [patches] int32,
    where so many lie together: those of each length see each other, padding sees itself alone."""
    each = np.asarray([*lengths, *(1,) * (patches - sum(lengths))], np.int32)
    ends = np.cumsum(each, dtype=np.int32)
    return np.repeat(ends - each, each), np.repeat(ends, each)


def tile_ranges(shapes: Sequence[Shape], patches: int) -> tuple[np.ndarray, np.ndarray]:
    """`ranges` of whole pictures, or of the tiles of each."""
    lengths = [shape.height * shape.width for shape in shapes for _ in range(shape.tiles)]
    return ranges(lengths, patches)
