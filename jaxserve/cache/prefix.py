"""Pages of sequences, and of prefixes that are kept in case somebody begins with them again.

Host only, no jax. A page has one reference for each sequence that holds it and one if the tree
knows it. Reading a page that is still being computed is safe: the device runs steps in order, and
within a step every layer writes the keys and values of all rows before any row reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from jaxserve.cache.host import HostPages, Place
from jaxserve.cache.keys import chain, namespace_key
from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.radix import Node, RadixTree
from jaxserve.errors import OutOfPagesError


@dataclasses.dataclass(slots=True)
class Lease:
    """The head of a sequence's pages that the tree knows as well, locked there. Pages behind it are
    the sequence's alone."""

    namespace: str = ""
    """See `cache.keys.namespace_of`."""
    node: Node | None = None
    """At whose end the last of the pages is; None for no page."""
    count: int = 0
    """Pages."""

    def none(self) -> Lease:
        """Of no page, in the same namespace."""
        return Lease(self.namespace)


class PrefixCache:
    """A page allocator that takes cached pages back when free ones run out.

    Tokens are given as the bytes of their keys, int32: see cache.keys.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        policy: str | None = "lru",
        host: HostPages | None = None,
    ):
        """policy: of eviction, "lru" or "lfu"; None keeps nothing. host: takes what is evicted."""
        self.allocator = allocator
        """Of all pages, the tree's included."""
        self.host = host
        """Where evicted pages go; None: they are forgotten."""
        on_evict = None if host is None else self._keep_on_host
        self.tree = RadixTree(page_size, policy or "lru", on_evict)
        self.enabled = policy is not None
        """Whether anything is kept."""
        self._page_bytes = 4 * page_size

    # -- as PageAllocator -------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self.allocator.num_pages

    @property
    def available(self) -> int:
        """Pages that can be allocated now: free, or cached and used by nobody."""
        return self.allocator.available + self.tree.evictable

    @property
    def cached(self) -> int:
        """Pages that the tree has."""
        return self.tree.size

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, each with one reference. OutOfPagesError takes none."""
        short = count - self.allocator.available
        if short > self.tree.evictable:
            raise OutOfPagesError(f"{count} pages wanted, {self.available} available")
        if short > 0:
            if self.host is not None:  # a full block costs what one page does
                short = max(short, self.host.width)
            self.allocator.release(self.tree.evict(short))
        return self.allocator.allocate(count)

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page; all must be in use."""
        self.allocator.share(pages)

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference from each page."""
        self.allocator.release(pages)

    # -- prefixes ---------------------------------------------------------------------------------

    def lease(self, namespace: str, tokens: bytes) -> tuple[Lease, list[int]]:
        """The longest cached prefix of `tokens`, in whole pages: locked, with a reference to each
        of its pages."""
        node = self.tree.match(namespace, tokens)
        if node is None:
            return Lease(namespace), []
        self.tree.lock(node)
        pages = self.tree.pages(node)
        self.allocator.share(pages)
        return Lease(namespace, node, len(pages)), pages

    def find_on_host(self, lease: Lease, tokens: bytes, most: int, unit: int = 1) -> list[Place]:
        """The pages of `tokens` behind the leased prefix that host memory has, at most `most` and a
        multiple of `unit`: `load` them before the next step. With a host tier only."""
        assert self.host is not None
        rest = tokens[lease.count * self._page_bytes :]
        if len(rest) < self._page_bytes or not most:
            return []
        node = lease.node
        key = namespace_key(lease.namespace) if node is None else self.tree.keys(node)[-1]
        return self.host.find(chain(key, rest, self._page_bytes), most, unit)

    def load(self, places: Sequence[Place], pages: Sequence[int]) -> None:
        """Copy pages found on the host into as many newly allocated ones."""
        assert self.host is not None
        self.host.load(places, pages)

    def used(self, lease: Lease) -> None:
        """The leased prefix is going to be read: that is what eviction goes by."""
        if lease.node is not None:
            self.tree.touch(lease.node)

    def copy(self, lease: Lease) -> Lease:
        """The same for another sequence, which brings its own references to the pages."""
        if lease.node is not None:
            self.tree.lock(lease.node)
        return dataclasses.replace(lease)

    def publish(self, lease: Lease, tokens: bytes, pages: Sequence[int]) -> None:
        """Let others begin with `tokens`, whole pages of a running sequence whose steps have been
        scheduled, and which are the head of its `pages`. Where the tree has other pages for the
        same tokens, it keeps those, and the sequence its own."""
        start, known = lease.count, len(tokens) // self._page_bytes
        if not self._may_keep(pages, start, known):
            return
        new, rest = pages[start:known], tokens[start * self._page_bytes :]
        node = self.tree.append(lease.node, lease.namespace, rest, new)
        if node is not None:
            self.allocator.share(new)
            lease.node, lease.count = node, known

    def end(self, lease: Lease, pages: Sequence[int], tokens: bytes = b"") -> None:
        """A sequence gives back its `pages`; those of `tokens`, whole pages at their head, stay
        cached. Of pages with the same tokens the tree keeps its own."""
        start, known = lease.count, len(tokens) // self._page_bytes
        if self._may_keep(pages, start, known):
            rest = tokens[start * self._page_bytes :]
            present = self.tree.insert(lease.node, lease.namespace, rest, pages[start:known])
            self.allocator.share(pages[start + present : known])
        if lease.node is not None:
            self.tree.unlock(lease.node)
        self.allocator.release(pages)

    def _may_keep(self, pages: Sequence[int], start: int, known: int) -> bool:
        """Whether pages[start:known] can go into the tree. Not while other samples of the prompt
        have any of them too, without a lease: evicting those would free nothing."""
        return self.enabled and known > start and self.allocator.unshared(pages[start:known])

    def _keep_on_host(self, node: Node, count: int) -> None:
        """The last `count` pages of `node` are evicted."""
        assert self.host is not None
        self.host.keep(self.tree.keys(node)[-count:], node.pages[-count:])

    def clear(self) -> None:
        """Forget all prefixes. Leases end by that: whoever has one must drop it."""
        self.allocator.release(self.tree.clear())
        self._clear_host()

    def reset(self) -> None:
        """All pages are free, whoever holds them, and nothing is cached, on the host neither."""
        self.tree.clear()
        self.allocator.reset()
        self._clear_host()

    def _clear_host(self) -> None:
        if self.host is not None:
            self.host.clear()
