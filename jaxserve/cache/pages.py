"""Which KV pages are free, and how many sequences hold each used one. Host only, no jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.errors import OutOfPagesError


class PageAllocator:
    """Reference counts of pages. The pool never grows.

    A page is free when its count is zero. Sequences that share a prompt share its full pages.
    """

    def __init__(self, num_pages: int, pages: Sequence[int] | None = None):
        """pages: of a pool of `num_pages`, those that it gives out; None: all."""
        self.num_pages = num_pages
        self._pages = range(num_pages) if pages is None else pages
        self.reset()

    def reset(self) -> None:
        """All pages are free, whoever holds them."""
        self._references = [0] * self.num_pages
        self._free = list(reversed(self._pages))

    @property
    def available(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    def counts(self) -> dict[int, int]:
        """References of each page that has any."""
        return {page: count for page, count in enumerate(self._references) if count}

    def unshared(self, pages: Iterable[int]) -> bool:
        """Whether each of `pages`, at least one, has one reference."""
        return max(map(self._references.__getitem__, pages)) == 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. OutOfPagesError takes none."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page; all must be in use."""
        for page in pages:
            if self._references[page] <= 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference from each page; those that reach zero are free again."""
        for page in pages:
            if self._references[page] <= 0:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
