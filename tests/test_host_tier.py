"""Host memory for evicted pages: its book-keeping against a brute-force model, and whole engines
with it and without."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxserve
from jaxserve.cache.host import HostPages, scatter_targets
from jaxserve.cache.keys import chain, namespace_key
from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.prefix import PrefixCache
from jaxserve.cache.radix import RadixTree
from tests import inside
from tests.marks import long
from tests.prompts import GREEDY, SMALL, ids, text

pytestmark = pytest.mark.usefixtures("exact_products", "kept_programs")
OPTIONS = {**SMALL, "max_total_tokens": 640}
ROOMY = {**OPTIONS, "max_total_tokens": 4096}
TIER = {**OPTIONS, "enable_hierarchical_cache": True, "hicache_ratio": 8.0}
SEEDED = {"temperature": 0.9, "sampling_seed": 5, "max_new_tokens": 24, "ignore_eos": True}


class Model:
    """Blocks as lists of keys, the least recently used first; what is copied, by content."""

    def __init__(self, num_blocks, width):
        self.num_blocks, self.width = num_blocks, width
        self.blocks: list[list[bytes]] = []
        self.wanted: list[bytes] = []
        self.open: list[bytes] | None = None

    def block_of(self, key):
        return next((block for block in self.blocks if key in block), None)

    def touch(self, block):
        self.blocks = [b for b in self.blocks if b is not block] + [block]

    def keep(self, key):
        block = self.block_of(key)
        if block is not None:
            self.touch(block)
            return
        if self.open is None or len(self.open) == self.width:
            if len(self.blocks) == self.num_blocks:
                idle = [b for b in self.blocks if not set(b) & set(self.wanted)]
                if not idle:
                    return
                self.blocks = [b for b in self.blocks if b is not idle[0]]
            self.open = []
            self.blocks.append(self.open)
        self.open.append(key)

    def find(self, keys, most):
        found = []
        for key in keys[:most]:
            if self.block_of(key) is None:
                break
            found.append(key)
        for key in reversed(found):
            self.touch(self.block_of(key))
        self.wanted += found
        return found


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(1, 6), width=st.integers(1, 5))
def test_blocks_against_a_model(seed, num_blocks, width):
    """Copies bring each page back with the content that it had when it was evicted."""
    random_ = random.Random(seed)
    host, model = HostPages(num_blocks, width), Model(num_blocks, width)
    keys = [bytes([i]) for i in range(40)]
    device: dict[int, bytes] = {}  # page -> the key that stands for its content
    memory: dict[tuple[int, int], bytes] = {}
    loads: list[tuple[int, bytes]] = []
    pages = iter(range(10**6))
    for _ in range(120):
        action = random_.random()
        if action < 0.45:
            start, count = random_.randrange(38), random_.randint(1, 7)
            some = keys[start : start + count]
            taken = [next(pages) for _ in some]
            device.update(zip(taken, some, strict=True))
            host.keep(some, taken)
            for key in some:
                model.keep(key)
        elif action < 0.75:
            start, most = random_.randrange(38), random_.randint(1, 9)
            places = host.find(iter(keys[start:]), most)
            found = model.find(keys[start:], most)
            assert len(places) == len(found)
            taken = [next(pages) for _ in found]
            host.load(places, taken)
            loads += zip(taken, found, strict=True)
        elif action < 0.97:
            out, into = host.take()
            for block, evicted in out:
                assert 1 <= len(evicted) <= width
                for index, page in enumerate(evicted):
                    memory[block, index] = device[page]
            for block, wanted in into:
                for index, page in wanted:
                    device[page] = memory[block, index]
            for page, key in loads:
                assert device[page] == key
            loads, model.wanted, model.open = [], [], None
        else:
            host.clear()
            model = Model(num_blocks, width)
            loads = []
        assert set(host._places) == {key for block in model.blocks for key in block}
        assert len(host) == sum(map(len, model.blocks)) <= num_blocks * width


def test_a_page_that_two_want_goes_to_both():
    wanted = [(2, 7), (0, 5), (2, 8), (2, 9), (0, 4)]
    arrays = [targets.tolist() for targets in scatter_targets(wanted, 4, 99)]
    assert arrays == [[5, 99, 7, 99], [4, 99, 8, 99], [99, 99, 9, 99]]
    assert list(scatter_targets([], 4, 99)) == []


def test_a_page_that_changes_hands_is_filled_once():
    host = HostPages(4, 1)
    host.keep([b"a", b"b"], [1, 2])
    host.take()
    for key, page in ((b"a", 3), (b"b", 3)):  # whoever had page 3 has given it back
        host.load(host.find([key], 1), [page])
    [(_, wanted)] = host.take().into
    [block] = [place.block for place in host.find([b"b"], 1)]
    assert wanted == [(0, 3)] and host._places[b"b"].block == block


def test_pages_are_found_in_whole_units():
    host = HostPages(4, 3)
    keys = [bytes([i]) for i in range(5)]
    host.keep(keys, range(5))
    assert [len(host.find(keys, most, 2)) for most in range(6)] == [0, 0, 2, 2, 4, 4]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), policy=st.sampled_from(["lru", "lfu"]))
def test_keys_of_a_tree_are_those_of_its_prefixes(seed, policy):
    """However nodes were split and cut, and whenever their keys were asked for."""
    random_, size = random.Random(seed), 2
    tree, pages = RadixTree(size, policy), iter(range(10**6))

    def packed(tokens):
        return np.asarray(tokens, np.int32).tobytes()

    for _ in range(60):
        tokens = packed([random_.randrange(2) for _ in range(size * random_.randint(1, 7))])
        name = random_.choice(["", "salt"])
        if random_.random() < 0.6:
            count = len(tokens) // (4 * size)
            tree.insert(None, name, tokens, [next(pages) for _ in range(count)])
        elif random_.random() < 0.3:
            tree.evict(random_.randint(1, 3))
        node = tree.match(name, tokens)
        if node is not None and random_.random() < 0.7:
            length = tree.length(name, tokens)
            every = list(chain(namespace_key(name), tokens[: 4 * size * length], 4 * size))
            assert tree.keys(node) == every[-len(node.pages) :]


def test_keys_tell_namespaces_and_order_apart():
    tokens = bytes(range(24))
    keys = [*chain(namespace_key("a"), tokens, 8), *chain(namespace_key("b"), tokens, 8)]
    keys += chain(namespace_key("a"), tokens[8:] + tokens[:8], 8)
    assert len(set(keys)) == len(keys) == 9
    assert list(chain(namespace_key("a"), tokens[:15], 8)) == keys[:1]


def test_eviction_takes_a_block_at_once_and_only_what_it_finds():
    host = HostPages(4, 3)
    cache = PrefixCache(PageAllocator(8), 2, "lru", host)
    tokens = np.arange(12, dtype=np.int32).tobytes()
    lease, _ = cache.lease("", b"")
    pages = cache.allocate(6)
    cache.end(lease, pages, tokens)
    cache.allocate(3)  # two were free
    assert (cache.cached, len(host)) == (3, 3)
    assert host.take().out[0][1] == pages[3:]
    cache.allocate(cache.available)
    assert (cache.cached, len(host)) == (0, 6)


@pytest.fixture(scope="module")
def plain(tiny_models):
    """A pool that nothing is ever evicted from, and no cache."""
    options = {**ROOMY, "disable_radix_cache": True}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        yield engine


@pytest.mark.parametrize(
    ("overlap", "params"),
    [(True, SEEDED), long(False, GREEDY)],
    ids=["overlap-seed", "no-overlap-greedy"],
)
def test_evicted_prompts_come_back(tiny_models, plain, params, overlap):
    """As much is found as in a pool for all of them, and the tokens are those without a cache."""
    prompts = [text(i % 3, 48) + text(20 + i, 100 + 3 * i) for i in range(8)]
    params = {**params, "max_new_tokens": 12}
    counts, outputs = {}, {}
    for name, options in (("tier", TIER), ("roomy", ROOMY), ("small", OPTIONS)):
        options = {**options, "disable_overlap_schedule": not overlap}
        with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
            rounds = [
                [engine.generate(input_ids=prompt, sampling_params=params) for prompt in prompts]
                for _ in range(3)
            ]
            info = engine.get_server_info()
        outputs[name] = [ids(each) for each in rounds]
        metas = [[result["meta_info"] for result in each] for each in rounds]
        counts[name] = [[meta["cached_tokens"] for meta in each] for each in metas]
        details = [meta["cached_tokens_details"] for each in metas for meta in each]
        if name == "tier":
            assert all(sum(d.values()) == c for d, c in zip(details, sum(counts[name], [])))  # noqa: B905, RUF017
            from_host = sum(d["host"] for d in details)
            assert from_host == info["cached_host_tokens"] == 16 * info["pages_moved_in"] > 0
            assert 0 < info["num_used_host_pages"] <= info["num_host_pages"] == 8 * 40
            assert info["pages_moved_out"] >= info["num_used_host_pages"]
            assert info["internal_states"][0]["memory_usage"]["host_kvcache"] > 0
        else:
            assert set(details) == {None}
            assert info["cached_host_tokens"] == info["num_host_pages"] == 0
        assert info["available_tokens"] == info["max_total_num_tokens"]
    assert counts["tier"] == counts["roomy"] != counts["small"]
    expected = ids(plain.generate(input_ids=prompts, sampling_params=params))
    assert all(each == [expected] * 3 for each in outputs.values())


@pytest.mark.long
def test_pressure_retracts_into_host_memory_to_the_same_tokens(tiny_models, plain):
    heads = [text(10 + i, 48) for i in range(3)]
    prompts = [heads[i % 3] + text(20 + i, 5 + i) for i in range(18)]
    ask = {"input_ids": prompts, "sampling_params": {**SEEDED, "max_new_tokens": 60}}
    expected = ids(plain.generate(**ask))
    for ratio in (0.2, 4.0):
        options = {**TIER, "max_total_tokens": 400, "hicache_ratio": ratio}
        with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
            results = [engine.generate(**ask) for _ in range(2)]
            info = engine.get_server_info()
        assert [ids(each) for each in results] == [expected] * 2
        assert info["retractions"] > 0 and info["pages_moved_in"] > 0
        assert info["num_host_pages"] <= ratio * 25


def test_salts_stay_apart_on_the_host_and_flushing_forgets_it(tiny_models):
    prompts = [text(i, 200) for i in range(4)]
    with jaxserve.Engine(model_path=tiny_models("llama"), **TIER) as engine:

        def cached(number, salt):
            result = engine.generate(
                input_ids=prompts[number], sampling_params=GREEDY, cache_salt=salt
            )
            return result["meta_info"]["cached_tokens"]

        assert [cached(i, "a") for i in range(4)] == [0] * 4
        assert cached(0, "a") == 192 and cached(1, "b") == 0
        assert engine.flush_cache().success
        assert engine.get_server_info()["num_used_host_pages"] == 0
        assert cached(0, "a") == 0


@pytest.mark.long
def test_a_window_and_a_host_tier_together(tiny_models):
    model = tiny_models("mistral", sliding_window=64, max_position_embeddings=4096)
    options = {**OPTIONS, "context_length": 2048, "max_total_tokens": 384}
    options |= {"chunked_prefill_size": 128, "cuda_graph_bs": None}
    prompts = [text(i, 150 + 100 * i) for i in range(4)]
    params = {**SEEDED, "max_new_tokens": 100}
    found = []
    for tier in (False, True):
        extra = {"enable_hierarchical_cache": tier, "hicache_ratio": 8.0}
        with jaxserve.Engine(model_path=model, **options, **extra) as engine:
            ask = {"input_ids": prompts, "sampling_params": params}
            found += [ids(engine.generate(**ask)) for _ in range(2)]
            info = engine.get_server_info()
    assert found == [found[0]] * 4 and info["pages_moved_in"] > 0


@pytest.mark.parametrize("phase", ["prepare", "dispatch", "copy"])
def test_a_failed_step_leaves_nothing_on_the_host(tiny_models, plain, monkeypatch, phase):
    """Its copies have not been made."""
    prompts = [text(i, 300) for i in range(4)]
    with jaxserve.Engine(model_path=tiny_models("llama"), **TIER) as engine:
        for prompt in prompts[:3]:
            engine.generate(input_ids=prompt, sampling_params=GREEDY)
        runner = inside.runner(engine)
        owner = runner.pages if phase == "copy" else runner
        real, failures = getattr(owner, phase), [RuntimeError("injected")]

        def broken(argument):
            if failures:
                raise failures.pop()
            return real(argument)

        monkeypatch.setattr(owner, phase, broken)
        ask = {"input_ids": prompts[3], "sampling_params": GREEDY}
        if phase == "prepare":
            with pytest.raises(RuntimeError, match="injected"):
                engine.generate(**ask)
        else:
            assert engine.generate(**ask)["meta_info"]["num_retractions"] == 1
        for prompt in prompts:
            ask = {"input_ids": prompt, "sampling_params": GREEDY}
            assert engine.generate(**ask)["output_ids"] == plain.generate(**ask)["output_ids"]


def test_its_size_is_checked_at_the_start(tiny_models):
    model = tiny_models("llama")
    for options, match in (
        ({"hicache_ratio": 0.04}, r"hicache_ratio=0.04 is .* less than a block of 2 pages"),
        ({"hicache_ratio": 1e9}, r"hicache_ratio=1e\+09 wants .* GiB of host memory"),
        ({"hicache_size": 10**6}, r"hicache_size=1e\+06 \(GB\) wants"),
        ({"hicache_size": -1}, r"hicache_size must be in \[0, 2147483647\], got -1"),
        ({"disable_radix_cache": True}, "disable_radix_cache=True keeps none"),
    ):
        with pytest.raises(jaxserve.InvalidRequestError, match=match):
            jaxserve.Engine(model_path=model, **{**TIER, **options})
    large = {"page_size": 256, "max_total_tokens": 2048}  # a GB is then few blocks
    with jaxserve.Engine(model_path=model, **{**TIER, **large, "hicache_size": 1}) as engine:
        usage = engine.get_server_info()["internal_states"][0]["memory_usage"]
        assert usage["host_kvcache"] == pytest.approx(1e9 / 2**30, rel=1e-3)


@pytest.mark.long
def test_the_copies_are_compiled_beforehand(tiny_models):
    options = {**TIER, "precompile": True, "max_running_requests": 2, "chunked_prefill_size": 64}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        for i in (0, 1, 2, 0):
            engine.generate(input_ids=text(i, 300), sampling_params=GREEDY)
        info = engine.get_server_info()
    assert info["pages_moved_in"] > 0 and info["late_compiles"] == 0
