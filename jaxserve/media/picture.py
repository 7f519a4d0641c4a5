"""A picture as a tower takes it, and where pictures stand in a prompt. No jax.

Letters: P patches, C colour channels, p a patch's side in pixels, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """How the patches of a picture lie: P = tiles * height * width."""

    tiles: int
    """Squares that the picture was cut into, one after the other; 1 of a picture that is whole."""
    height: int
    """Rows of patches, of each tile."""
    width: int
    """Patches of a row."""

    @property
    def patches(self) -> int:
        """P."""
        return self.tiles * self.height * self.width


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """One picture of a prompt, ready for its tower; or what a tower would make of it."""

    tokens: int
    """Tokens of the prompt in whose place it stands."""
    digest: bytes
    """SHA-256 of all that its features follow from: 32 bytes."""
    shape: Shape | None = None
    """None where `features` are given."""
    patches: np.ndarray | None = None
    """[P, C * p * p], channels first within a patch, in the order in which the tower takes them:
    uint8 as resized, or float32, normalized already. None where `features` are given."""
    features: np.ndarray | None = None
    """[tokens, width of the tower's rows] float32, in place of patches."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class PromptMedia:
    """The pictures of one prompt of T tokens, and what its tokens are because of them."""

    pictures: tuple[Picture, ...]
    """In the prompt's order."""
    owners: np.ndarray
    """[T] int32: the number of the picture in whose place the token stands, -1 for text."""
    offsets: np.ndarray
    """[T] int32: which of its picture's tokens it is; 0 for text."""
    keys: np.ndarray
    """[T] int32: what caches know the tokens by; negative for those of pictures."""
    positions: np.ndarray | None = None
    """[3, T] int32: time, row and column by which a token is rotated; None: its place alone."""
    delta: int = 0
    """What is added to a generated token's place, to rotate it by."""
    reach: np.ndarray | None = None
    """[T] int32: the last position that a token sees, for decoders that see a picture's tokens as a
    block; None: its own."""

    @property
    def tokens(self) -> int:
        """Of all pictures."""
        return sum(picture.tokens for picture in self.pictures)

    def spans(self) -> np.ndarray:
        """[pictures, 2] int: the first token of each picture, and the one behind its last."""
        at = np.flatnonzero(self.owners >= 0)
        numbers = np.arange(len(self.pictures))
        firsts = at[np.searchsorted(self.owners[at], numbers, "left")]
        lasts = at[np.searchsorted(self.owners[at], numbers, "right") - 1]
        return np.stack([firsts, lasts + 1], axis=1)

    def block_end(self, start: int) -> int:
        """The token behind the block that begins at `start`."""
        return start + 1 if self.reach is None else int(self.reach[start]) + 1

    @property
    def longest_block(self) -> int:
        """Tokens of a prompt that have to run in the same step, at most; 1: any may be alone."""
        if self.reach is None:
            return 1
        return int(np.bincount(self.reach).max())

    def uncut(self, count: int) -> int:
        """The most of the first `count` tokens that can stand for themselves: where a picture's
        tokens see each other, all of them or none."""
        if self.reach is None or not 0 < count < len(self.reach):
            return count
        last = self.reach[count - 1]
        if last < count:
            return count
        return int(np.searchsorted(self.reach, last))
