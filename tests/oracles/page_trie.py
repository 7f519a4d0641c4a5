"""A prefix cache page by page, by brute force: a dict from each cached prefix to its last page."""

from __future__ import annotations

import dataclasses
from collections import Counter

Prefix = tuple[str, tuple[tuple[int, ...], ...]]
"""A namespace, and the token ids of each page of a prefix."""


@dataclasses.dataclass
class CachedPage:
    page: int
    used: int = 0
    hits: int = 0


@dataclasses.dataclass(eq=False)
class Holder:
    """A running sequence: its tokens by page (the last may be partial), and its pages. The first
    `leased` pages are the cache's."""

    namespace: str
    tokens: list[int]
    pages: list[int]
    leased: int


class PageTrie:
    """What a PrefixCache of `num_pages` pages must hold, evict and count."""

    def __init__(self, num_pages: int, page_size: int, by_hits: bool):
        self.num_pages, self.page_size, self.by_hits = num_pages, page_size, by_hits
        self.cached: dict[Prefix, CachedPage] = {}
        self.holders: list[Holder] = []
        self.clock = 0

    def prefixes(self, namespace: str, tokens: list[int], pages: int) -> list[Prefix]:
        """The first `pages` prefixes of `tokens`, shortest first."""
        size = self.page_size
        spans = [tuple(tokens[i * size : (i + 1) * size]) for i in range(pages)]
        return [(namespace, tuple(spans[: i + 1])) for i in range(pages)]

    def longest(self, namespace: str, tokens: list[int]) -> list[Prefix]:
        """The cached prefixes of `tokens`."""
        every = self.prefixes(namespace, tokens, len(tokens) // self.page_size)
        count = next((i for i, p in enumerate(every) if p not in self.cached), len(every))
        return every[:count]

    def use(self, prefixes: list[Prefix], hits: int) -> None:
        self.clock += 1
        for prefix in prefixes:
            self.cached[prefix].used = self.clock
            self.cached[prefix].hits += hits

    def put(self, holder: Holder, pages: int) -> None:
        """Cache the first `pages` pages of a holder, where there are none yet."""
        every = self.prefixes(holder.namespace, holder.tokens, pages)
        for prefix, page in zip(every, holder.pages, strict=False):
            self.cached.setdefault(prefix, CachedPage(page))
        self.use(every, 0)

    @property
    def locks(self) -> Counter[Prefix]:
        counts: Counter[Prefix] = Counter()
        for h in self.holders:
            counts.update(self.prefixes(h.namespace, h.tokens, h.leased))
        return counts

    @property
    def references(self) -> list[int]:
        counts = Counter(entry.page for entry in self.cached.values())
        for holder in self.holders:
            counts.update(holder.pages)
        return [counts[page] for page in range(self.num_pages)]

    @property
    def available(self) -> int:
        locks = self.locks
        free = sum(count == 0 for count in self.references)
        return free + sum(not locks[prefix] for prefix in self.cached)

    def make_room(self, count: int) -> None:
        """Evict until `count` pages are free: each time the best leaf that nobody has locked."""
        locks = self.locks
        while sum(count == 0 for count in self.references) < count:
            parents = {(name, spans[:-1]) for name, spans in self.cached}
            leaves = [p for p in self.cached if p not in parents and not locks[p]]
            del self.cached[min(leaves, key=self._rank)]

    def _rank(self, prefix: Prefix) -> tuple[int, int]:
        entry = self.cached[prefix]
        return (entry.hits if self.by_hits else 0), entry.used
