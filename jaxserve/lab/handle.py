"""Values: a prefix of tokens whose keys and values lie in the pool."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxserve.lab.lab import Lab


class History:
    """The tokens of a value: the first ones of another's, and further ones. The latter may lie on
    the device, and are read when somebody asks."""

    __slots__ = ("_added", "_before", "_kept", "_row")

    def __init__(self, before: History | None, kept: int, added: Any, row: int | None = None):
        """kept: tokens of `before`. added: [n] int32; with `row` that number of an array."""
        self._before, self._kept = before, kept
        self._added, self._row = added, row

    def tokens(self, length: int) -> np.ndarray:
        """The first `length`, [length] int32. Waits for those on the device."""
        parts: list[np.ndarray] = []
        at: History | None = self
        while at is not None and length > 0:
            if length > at._kept:
                parts.append(at._read()[: length - at._kept])
            length, at = min(length, at._kept), at._before
        return np.concatenate([np.empty(0, np.int32), *reversed(parts)])

    def _read(self) -> np.ndarray:
        if self._row is not None:
            self._added = np.asarray(self._added)[self._row : self._row + 1].astype(np.int32)
            self._row = None
        return self._added


@dataclasses.dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Handle:
    """A sequence of `length` tokens, which never changes: what makes it longer or shorter makes
    another handle. Its pages are given back when it is freed or dropped."""

    lab: Lab
    pages: tuple[int, ...]
    """Of the engine's pool, in the order of the tokens."""
    length: int
    """Tokens with keys and values."""
    cached_tokens: int
    """Those of them that were found in the prefix cache."""
    history: History = dataclasses.field(repr=False)
    lives: int = dataclasses.field(repr=False)
    """How often the laboratory had lost its pages when it was made."""
    end: weakref.finalize[Any, Any] = dataclasses.field(init=False, repr=False)
    """Gives the pages back, once."""

    def __post_init__(self) -> None:
        end = weakref.finalize(self, self.lab.dropped, self.pages, self.lives)
        end.atexit = False
        object.__setattr__(self, "end", end)

    @property
    def tokens(self) -> list[int]:
        """Its `length` token ids. Waits for those that are on the device."""
        return self.history.tokens(self.length).tolist()

    @property
    def freed(self) -> bool:
        """Whether `Lab.free` has taken it."""
        return not self.end.alive

    def fork(self) -> Handle:
        """See `Lab.fork`."""
        return self.lab.fork(self)

    def longer(self, pages: tuple[int, ...], added: Any, row: int | None = None) -> Handle:
        """With `added` tokens (`History`) behind, in `pages` that are held for it."""
        count = len(added) if row is None else 1
        history = History(self.history, self.length, added, row)
        length = self.length + count
        return Handle(self.lab, pages, length, self.cached_tokens, history, self.lives)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Output:
    """What a call computes, for each handle that it was given."""

    handles: Sequence[Handle]
    """The longer ones."""
    logits: Any
    """[B, V] float32 jax.Array, of what comes behind the last token; with at="all" a list, for each
    handle [n, V] of all tokens that ran. On the device, and perhaps not computed yet."""
    hidden: Any
    """[B, D], or a list of [n, D]: after the final norm, of the same tokens."""
