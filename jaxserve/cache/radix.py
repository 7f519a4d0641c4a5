"""A radix tree of token prefixes, and the pages that hold their KV. Host only, no jax.

Pages are the unit: a node's edge is a span of whole pages, and children differ in their first page.
Tokens travel as the bytes of their keys (cache.keys), int32, so that spans are compared and hashed
by memcmp.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxserve.cache.keys import chain, namespace_key

TOKEN_BYTES = 4


class Node:
    """A span of pages below `parent`."""

    __slots__ = ("children", "hits", "key", "locks", "pages", "parent", "queued", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: bytes = b"", pages: Sequence[int] = ()):
        self.parent = parent
        """None of a root."""
        self.tokens = tokens
        """Bytes of the span, int32; behind those of `pages` may come some of evicted pages."""
        self.pages = list(pages)
        """On the device."""
        self.children: dict[bytes, Node] = {}
        """By the bytes of their first page."""
        self.locks = 0
        """Sequences that use the span."""
        self.used = 0
        """When it was last used, by the tree's own clock."""
        self.hits = 0
        """How often it was matched."""
        self.queued = False
        """It has an entry in the heap of what can be evicted."""
        self.key: bytes | None = None
        """Of the prefix before the span (cache.keys), once somebody has asked."""


class Root(Node):
    """The top of a namespace, with an empty span: there as long as it has children."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str):
        super().__init__(None)
        self.namespace = namespace


Entry = tuple[int, int, int, Node]
"""Of the eviction heap: hits (0 for lru), last use, a serial number, the node."""


class RadixTree:
    """Prefixes by namespace. The tree counts pages and does not own them.

    A locked node, and so each of its ancestors, stays. Of the others the least recently used leaf
    goes first (`policy` "lru"), or the least often matched one ("lfu", ties by last use), its last
    page first.
    """

    def __init__(
        self,
        page_size: int,
        policy: str = "lru",
        on_evict: Callable[[Node, int], object] | None = None,
    ):
        """on_evict: called with a node before it loses its last so many pages to eviction."""
        self.size = 0
        """Pages."""
        self.evictable = 0
        """Those of them in nodes that nobody has locked."""
        self.version = 0
        """Counts insertions."""
        self._page_size = page_size
        self._page_bytes = TOKEN_BYTES * page_size
        self._by_hits = policy == "lfu"
        self._on_evict = on_evict
        self._roots: dict[str, Root] = {}
        self._heap: list[Entry] = []
        self._serial = itertools.count()
        self._clock = 0

    # -- looking ----------------------------------------------------------------------------------

    def length(self, namespace: str, tokens: bytes) -> int:
        """How many leading whole pages of `tokens` are here. Changes nothing."""
        root = self._roots.get(namespace)
        if root is None:
            return 0
        end = len(tokens) - len(tokens) % self._page_bytes
        _, at, _, same = self._descend(root, tokens, 0, end)
        return at // self._page_bytes + same

    def match(self, namespace: str, tokens: bytes) -> Node | None:
        """The node at which the longest known prefix of `tokens`, in whole pages, ends; None for no
        page. A node in which it ends halfway is split. Lock the node before anything else."""
        root = self._roots.get(namespace)
        if root is None:
            return None
        node, _ = self._reach(root, tokens, len(tokens) - len(tokens) % self._page_bytes)
        return None if node is root else node

    def pages(self, node: Node) -> list[int]:
        """The pages from the root to the end of `node`."""
        spans = [each.pages for each in self._path(node)]
        return list(itertools.chain.from_iterable(reversed(spans)))

    def keys(self, node: Node) -> list[bytes]:
        """The keys of the prefixes that end with each page of `node`."""
        path: list[Node] = []
        top: Node | None = node
        while top is not None and top.key is None:
            path.append(top)
            top = top.parent
        keys: list[bytes] = []
        if top is not None:
            path.append(top)
        for each in reversed(path):
            if isinstance(each, Root):
                each.key = namespace_key(each.namespace)
                keys = [each.key]
                continue
            if each.key is None:
                each.key = keys[-1]
            size = len(each.pages) * self._page_bytes
            keys = list(chain(each.key, each.tokens[:size], self._page_bytes))
        return keys

    # -- changing ---------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Keep `node` and its ancestors until as many calls of `unlock`."""
        for each in self._path(node):
            if not each.locks:
                self.evictable -= len(each.pages)
            each.locks += 1

    def unlock(self, node: Node) -> None:
        """Take back one `lock`."""
        for each in self._path(node):
            if each.locks <= 0:
                raise ValueError("a node is unlocked more often than it was locked")
            each.locks -= 1
            if not each.locks:
                self.evictable += len(each.pages)
        self._offer(node)

    def touch(self, node: Node) -> None:
        """`node` and its ancestors were matched just now."""
        self._use(node, hits=1)

    def append(
        self, node: Node | None, namespace: str, tokens: bytes, pages: Sequence[int]
    ) -> Node | None:
        """A new locked child of the locked `node` (None: the namespace's root), with at least one
        page; None, and no child, if there is one that begins with the same page."""
        parent = self._root(namespace) if node is None else node
        if tokens[: self._page_bytes] in parent.children:
            return None
        child = self._attach(parent, tokens, pages)
        child.locks = 1
        self.evictable -= len(pages)
        self._use(child, hits=0)
        return child

    def insert(self, node: Node | None, namespace: str, tokens: bytes, pages: Sequence[int]) -> int:
        """Put `tokens` and their pages, at least one, below `node` (None: the namespace's root).
        How many leading pages were there already; the tree has taken the others."""
        start = self._root(namespace) if node is None else node
        end, at = self._reach(start, tokens, len(tokens))
        present = at // self._page_bytes
        if present < len(pages):
            end = self._attach(end, tokens[at:], pages[present:])
            self._offer(end)
        self._use(end, hits=0)
        return present

    def evict(self, count: int) -> list[int]:
        """Forget `count` pages, or as many as nobody has locked, and return them."""
        freed: list[int] = []
        heap = self._heap
        while len(freed) < count and heap:
            entry = heap[0]
            node = entry[3]
            if node.locks or node.children:
                heapq.heappop(heap)
                node.queued = False
            elif entry[:2] != self._rank(node):
                heapq.heapreplace(heap, self._entry(node))
            else:
                taken = min(count - len(freed), len(node.pages))
                if self._on_evict is not None:
                    self._on_evict(node, taken)
                freed += node.pages[-taken:]
                del node.pages[-taken:]
                self.size -= taken
                self.evictable -= taken
                if not node.pages:
                    heapq.heappop(heap)
                    self._detach(node)
        return freed

    def clear(self) -> list[int]:
        """Forget everything, locked or not, and return the pages. No node may be used any more."""
        pages = [page for node in self._nodes() for page in node.pages]
        self._roots.clear()
        self._heap.clear()
        self.size = self.evictable = 0
        self.version += 1
        return pages

    # -- within -----------------------------------------------------------------------------------

    def _path(self, node: Node) -> Iterator[Node]:
        """From `node` up to the child of the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _nodes(self) -> Iterator[Node]:
        left = [child for root in self._roots.values() for child in root.children.values()]
        while left:
            node = left.pop()
            left += node.children.values()
            yield node

    def _root(self, namespace: str) -> Root:
        """The top of `namespace`; a new one must get a child at once."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Root(namespace)
        return root

    def _descend(
        self, node: Node, tokens: bytes, at: int, end: int
    ) -> tuple[Node, int, Node | None, int]:
        """Follow tokens[at:end] down from `node`. (node, at, child, same): the last node that
        matches whole and where in `tokens` it ends; its child of which `same` pages match too."""
        while at < end:
            child = node.children.get(tokens[at : at + self._page_bytes])
            if child is None:
                break
            size = len(child.pages) * self._page_bytes
            if len(child.tokens) > size:
                child.tokens = child.tokens[:size]
            if at + size > end or not tokens.startswith(child.tokens, at):
                return node, at, child, self._common(child.tokens, tokens, at, end)
            node, at = child, at + size
        return node, at, None, 0

    def _common(self, span: bytes, tokens: bytes, at: int, end: int) -> int:
        """Leading pages that `span` and tokens[at:end] have in common."""
        pages = min(len(span), end - at) // self._page_bytes
        count = pages * self._page_size
        ours = np.frombuffer(span, np.int32, count)
        theirs = np.frombuffer(tokens, np.int32, count, at)
        different = np.flatnonzero(ours != theirs)
        return int(different[0]) // self._page_size if len(different) else pages

    def _reach(self, node: Node, tokens: bytes, end: int) -> tuple[Node, int]:
        """The node at which the match of tokens[:end] ends, and how many bytes it is long. A node
        in which it ends halfway is split."""
        node, at, child, same = self._descend(node, tokens, 0, end)
        if child is None:
            return node, at
        return self._split(child, same), at + same * self._page_bytes

    def _split(self, node: Node, count: int) -> Node:
        """Move the first `count` pages of `node` into a new parent. Locks below cover it too, and
        `node` stays what it was for those who hold it: the end of the same prefix."""
        assert node.parent is not None
        size = count * self._page_bytes
        upper = Node(node.parent, node.tokens[:size], node.pages[:count])
        upper.locks, upper.used, upper.hits = node.locks, node.used, node.hits
        upper.key, node.key = node.key, None
        node.parent.children[upper.tokens[: self._page_bytes]] = upper
        node.tokens, node.pages = node.tokens[size:], node.pages[count:]
        node.parent = upper
        upper.children[node.tokens[: self._page_bytes]] = node
        return upper

    def _attach(self, parent: Node, tokens: bytes, pages: Sequence[int]) -> Node:
        child = parent.children[tokens[: self._page_bytes]] = Node(parent, tokens, pages)
        self.size += len(pages)
        self.evictable += len(pages)
        self.version += 1
        return child

    def _detach(self, node: Node) -> None:
        """Remove a leaf that has lost its last page, and a root that has lost its last leaf."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[: self._page_bytes]]
        if not isinstance(parent, Root):
            self._offer(parent)
        elif not parent.children:
            del self._roots[parent.namespace]

    def _use(self, node: Node, hits: int) -> None:
        self._clock += 1
        for each in self._path(node):
            each.used = self._clock
            each.hits += hits

    def _rank(self, node: Node) -> tuple[int, int]:
        return (node.hits if self._by_hits else 0), node.used

    def _entry(self, node: Node) -> Entry:
        return (*self._rank(node), next(self._serial), node)

    def _offer(self, node: Node) -> None:
        """Queue `node` for eviction if it is an unlocked leaf. Entries may become stale: `evict`
        drops or renews those."""
        if not (node.queued or node.locks or node.children):
            node.queued = True
            heapq.heappush(self._heap, self._entry(node))
