"""The prefix cache against a page-by-page model, under random operations."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.prefix import Lease, PrefixCache
from jaxserve.cache.radix import RadixTree
from jaxserve.errors import OutOfPagesError
from tests.oracles.page_trie import Holder, PageTrie

SIZE = 2


def packed(tokens):
    return np.asarray(tokens, np.int32).tobytes()


def contents(cache):
    """(namespace, tokens by page) -> (page, locks) of all that the tree holds."""
    found = {}
    left = [(name, (), child) for name, root in cache.tree._roots.items()
            for child in root.children.values()]  # fmt: skip
    for name, root in cache.tree._roots.items():
        assert root.children, f"the empty namespace {name!r} is left over"
    while left:
        name, above, node = left.pop()
        tokens = np.frombuffer(node.tokens, np.int32)[: len(node.pages) * SIZE].reshape(-1, SIZE)
        assert len(tokens) == len(node.pages) > 0
        spans = above
        for span, page in zip(tokens.tolist(), node.pages, strict=True):
            spans = (*spans, tuple(span))
            found[name, spans] = (page, node.locks)
        for child in node.children.values():
            assert child.parent is node
            assert node.locks >= child.locks
            left.append((name, spans, child))
    return found


class CacheMachine(RuleBasedStateMachine):
    """Sequences begin, grow, fork, are published and end, in a pool that is too small for them."""

    @initialize(pages=st.integers(3, 24), policy=st.sampled_from(["lru", "lfu"]))
    def start(self, pages, policy):
        self.cache = PrefixCache(PageAllocator(pages), SIZE, policy)
        self.model = PageTrie(pages, SIZE, policy == "lfu")
        self.leases = {}

    def allocate(self, count):
        """Pages of both, or None if neither has them."""
        if count > self.model.available:
            with pytest.raises(OutOfPagesError):
                self.cache.allocate(count)
            return None
        self.model.make_room(count)
        free = {page for page, count in enumerate(self.model.references) if not count}
        pages = self.cache.allocate(count)
        assert len(set(pages)) == count and set(pages) <= free
        return pages

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        namespace=st.sampled_from(["", "", "salt"]),
        whole=st.booleans(),
    )
    def begin(self, tokens, namespace, whole):
        model, limit = self.model, len(tokens) if whole else len(tokens) - 1
        prefixes = model.longest(namespace, tokens[:limit])
        before = self.cache.tree.length(namespace, packed(tokens[:limit]))
        lease, shared = self.cache.lease(namespace, packed(tokens[:limit]))
        assert shared == [model.cached[prefix].page for prefix in prefixes]
        assert before == lease.count == len(shared)
        holder = Holder(namespace, tokens, shared, len(shared))
        model.holders.append(holder)
        own = self.allocate(-(-len(tokens) // SIZE) - len(shared))
        if own is None:
            model.holders.remove(holder)
            self.cache.end(lease, shared)
            return
        self.cache.used(lease)
        if prefixes:
            model.use(prefixes, 1)
        holder.pages = shared + own
        self.leases[holder] = lease

    def pick(self, number):
        """One of the sequences; there is always one."""
        if not self.model.holders:
            self.begin([number % 2], "", True)
        return self.model.holders[number % len(self.model.holders)]

    @rule(number=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, number, token):
        holder = self.pick(number)
        if len(holder.tokens) == len(holder.pages) * SIZE:
            page = self.allocate(1)
            if page is None:
                return
            holder.pages += page
        holder.tokens.append(token)

    @rule(number=st.integers(0, 99), part=st.floats(0, 1))
    def publish(self, number, part):
        holder, lease = self.pick(number), self.leases[self.pick(number)]
        count = int(len(holder.tokens) // SIZE * part)
        self.cache.publish(lease, packed(holder.tokens[: count * SIZE]), holder.pages)
        every = self.model.prefixes(holder.namespace, holder.tokens, count)
        alone = count > holder.leased and self.model.references[holder.pages[holder.leased]] == 1
        if alone and every[holder.leased] not in self.model.cached:
            self.model.put(holder, count)
            holder.leased = count
        assert lease.count == holder.leased

    @rule(number=st.integers(0, 99))
    def fork(self, number):
        holder = self.pick(number)
        full = len(holder.tokens) // SIZE
        partial = self.allocate(-(-len(holder.tokens) // SIZE) - full)
        if partial is None:
            return
        self.cache.share(holder.pages[:full])
        twin = Holder(
            holder.namespace, list(holder.tokens), holder.pages[:full] + partial, holder.leased
        )
        self.leases[twin] = self.cache.copy(self.leases[holder])
        self.model.holders.append(twin)

    @rule(number=st.integers(0, 99), part=st.floats(0, 1), keep=st.booleans())
    def end(self, number, part, keep):
        holder = self.pick(number)
        count = int(len(holder.tokens) // SIZE * part) if keep else 0
        self.cache.end(self.leases.pop(holder), holder.pages, packed(holder.tokens[: count * SIZE]))
        if count > holder.leased and self.model.references[holder.pages[holder.leased]] == 1:
            self.model.put(holder, count)
        self.model.holders.remove(holder)

    @rule(really=st.sampled_from([True, False, False, False]))
    def clear(self, really):
        if not really:
            return
        self.cache.clear()
        self.model.cached.clear()
        for holder in self.model.holders:
            holder.leased = 0
            self.leases[holder] = Lease(holder.namespace)

    @invariant()
    def the_two_agree(self):
        if not hasattr(self, "cache"):
            return
        model, locks = self.model, self.model.locks
        assert contents(self.cache) == {
            prefix: (entry.page, locks[prefix]) for prefix, entry in model.cached.items()
        }
        assert self.cache.allocator._references == model.references
        assert self.cache.available == model.available
        assert self.cache.tree.evictable == sum(not locks[prefix] for prefix in model.cached)
        assert self.cache.cached == len(model.cached)
        heap = [entry[3] for entry in self.cache.tree._heap]
        assert len(heap) == len(set(heap)) and all(node.queued for node in heap)


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestCacheAgainstModel = CacheMachine.TestCase


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_ten_thousand_operations_on_one_cache(policy):
    random_ = random.Random(7)
    machine = CacheMachine()
    machine.start(40, policy)
    operations = ["begin"] * 4 + ["grow"] * 6 + ["publish"] * 2 + ["fork", "end", "end", "end"]
    counts = Counter()
    for _ in range(10_000):
        operation = random_.choice(operations) if random_.random() > 1e-3 else "clear"
        number, part = random_.randrange(100), random_.choice([1.0, 1.0, random_.random()])
        if operation == "begin":
            tokens = [random_.randrange(2) for _ in range(random_.randint(1, 14))]
            machine.begin(tokens, random_.choice(["", "", "salt"]), random_.random() < 0.5)
        elif operation == "grow":
            machine.grow(number, random_.randrange(2))
        elif operation == "publish":
            machine.publish(number, part)
        elif operation == "fork":
            machine.fork(number)
        elif operation == "end":
            machine.end(number, part, random_.random() < 0.8)
        else:
            machine.clear(True)
        machine.the_two_agree()
        counts[operation] += 1
    assert counts.total() == 10_000 and min(counts.values()) > 2


def test_the_least_recently_used_leaf_goes_first_and_its_tail_before_its_head():
    cache = PrefixCache(PageAllocator(6), SIZE, "lru")
    for tokens in ([1, 1, 2, 2, 3, 3], [1, 1, 4, 4], [5, 5]):
        lease, shared = cache.lease("", packed(tokens))
        pages = shared + cache.allocate(len(tokens) // SIZE - len(shared))
        cache.end(lease, pages, packed(tokens))
    assert cache.available == 6 and cache.allocator.available == 1
    lease, shared = cache.lease("", packed([1, 1, 2, 2, 3, 3]))
    cache.used(lease)
    cache.end(lease, shared)
    length = lambda *tokens: cache.tree.length("", packed(tokens))  # noqa: E731
    taken = cache.allocate(2)
    assert (length(1, 1, 4, 4), length(5, 5), length(1, 1, 2, 2, 3, 3)) == (1, 1, 3)
    taken += cache.allocate(2)
    assert (length(5, 5), length(1, 1, 2, 2, 3, 3)) == (0, 2)
    cache.release(taken)


def test_the_least_often_matched_leaf_goes_first_with_lfu():
    cache = PrefixCache(PageAllocator(2), SIZE, "lfu")
    for tokens in ([1, 1], [2, 2]):
        lease, _ = cache.lease("", packed(tokens))
        cache.end(lease, cache.allocate(1), packed(tokens))
    for tokens in ([1, 1], [1, 1], [2, 2]):
        lease, shared = cache.lease("", packed(tokens))
        cache.used(lease)
        cache.end(lease, shared)
    cache.release(cache.allocate(1))
    assert cache.tree.length("", packed([1, 1])) == 1
    assert cache.tree.length("", packed([2, 2])) == 0


def test_nothing_is_kept_when_it_is_off():
    cache = PrefixCache(PageAllocator(4), SIZE, None)
    lease, _ = cache.lease("", packed([1, 1]))
    pages = cache.allocate(2)
    cache.publish(lease, packed([1, 1]), pages)
    cache.end(lease, pages, packed([1, 1, 2, 2]))
    assert cache.allocator.available == 4
    assert cache.lease("", packed([1, 1])) == (Lease(""), [])


def test_misuse_is_noticed():
    tree = RadixTree(SIZE)
    tree.insert(None, "", packed([1, 1]), [0])
    node = tree.match("", packed([1, 1]))
    with pytest.raises(ValueError, match="unlocked more often"):
        tree.unlock(node)


def test_a_long_prompt_is_matched_in_microseconds_and_evicted_by_the_page():
    """10,000 tokens, 157 pages: a hundred matches, and a thousand evictions among 1,000 leaves."""
    rng = np.random.default_rng(0)
    tree = RadixTree(64)
    prompts = rng.integers(0, 1000, (1000, 10_048)).astype(np.int32)
    for number, prompt in enumerate(prompts):
        tree.insert(None, "", prompt.tobytes(), list(range(number * 157, (number + 1) * 157)))
    tokens = [prompt.tobytes() for prompt in prompts[:100]]
    started = time.perf_counter()
    assert all(tree.length("", each) == 157 for each in tokens)
    matched = time.perf_counter()
    for _ in range(1000):
        assert len(tree.evict(1)) == 1
    evicted = time.perf_counter()
    assert (matched - started) / 100 < 200e-6
    assert (evicted - matched) / 1000 < 100e-6
