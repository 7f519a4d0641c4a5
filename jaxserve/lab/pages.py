"""The pages of a laboratory: shared by values, and written behind their ends. No jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.cache.pages import PageAllocator
from jaxserve.errors import OutOfPagesError


class Growth(NamedTuple):
    """What a longer value has."""

    pages: tuple[int, ...]
    """All of its pages, held for it."""
    copies: tuple[tuple[int, int], ...]
    """(source, destination): pages to copy before its tokens are written."""


class LabPages(PageAllocator):
    """One reference for each value that has a page, and how far each page is written.

    A value of L tokens reads nothing behind them, so one that is a token longer can share all of
    its pages and write into the last one, once: whoever comes second finds it written there, and
    has a copy.
    """

    def __init__(self, pages: Sequence[int], page_size: int) -> None:
        """pages: of the engine's pool, reserved."""
        super().__init__(max(pages) + 1, pages)
        self.all = tuple(pages)
        self._size = page_size
        self._written = dict.fromkeys(pages, 0)

    def allocate(self, count: int) -> list[int]:
        """Pages for one value, none of them written. OutOfPagesError takes none."""
        self._check(count)
        pages = super().allocate(count)
        self._written.update(dict.fromkeys(pages, 0))
        return pages

    def grow(self, values: Sequence[tuple[tuple[int, ...], int, int]]) -> list[Growth]:
        """Values of (pages, their tokens, further tokens), one after the other. OutOfPagesError:
        there are not enough for all, and nothing was taken."""
        needed, written = 0, dict[int, int]()
        for pages, length, more in values:
            kept, own = self._tail(pages, length, written)
            needed += self._pages_of(length + more) - kept + (not own)
            if own and length % self._size:
                written[pages[kept - 1]] = self._filled(kept - 1, length + more)
        self._check(needed)
        return [self._grown(*value) for value in values]

    def cut(self, pages: tuple[int, ...], length: int) -> tuple[int, ...]:
        """Those of the first `length` tokens, held for one more value."""
        kept = pages[: self._pages_of(length)]
        self.share(kept)
        return kept

    def mark(self, pages: Sequence[int], length: int) -> None:
        """`pages` are written as far as a value of `length` tokens reads."""
        for number, page in enumerate(pages):
            self._written[page] = max(self._written[page], self._filled(number, length))

    def _check(self, needed: int) -> None:
        if needed > self.available:
            raise OutOfPagesError(
                f"{needed} pages are wanted and {self.available} of the laboratory's "
                f"{len(self.all)} are free: free handles, or ask for more max_tokens"
            )

    def _grown(self, pages: tuple[int, ...], length: int, more: int) -> Growth:
        kept, own = self._tail(pages, length, self._written)
        held, copies = list(pages[:kept]), []
        if not own:
            (page,) = self.allocate(1)
            copies.append((held.pop(), page))
            self.share(held)
            held.append(page)
        else:
            self.share(held)
        held += self.allocate(self._pages_of(length + more) - kept)
        for number in range(length // self._size, len(held)):
            self._written[held[number]] = self._filled(number, length + more)
        return Growth(tuple(held), tuple(copies))

    def _tail(
        self, pages: tuple[int, ...], length: int, written: dict[int, int]
    ) -> tuple[int, bool]:
        """How many of `pages` a longer value has, too, and whether it may write into the last."""
        kept, used = self._pages_of(length), length % self._size
        if not used:
            return kept, True
        page = pages[kept - 1]
        return kept, written.get(page, self._written[page]) == used

    def _filled(self, number: int, length: int) -> int:
        """Tokens of a value of `length` tokens in its page `number`."""
        return min(self._size, length - number * self._size)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._size)
