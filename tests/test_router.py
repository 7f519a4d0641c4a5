"""Who gets a prompt, against what a plain reading of the rules says; sums of counters."""

from __future__ import annotations

import random
import types

import pytest

from jaxserve.mailbox import Mailbox
from jaxserve.packing.slots import Slots
from jaxserve.replicas import totals
from jaxserve.replicas.prefixes import LEAST_BLOCK, PrefixIndex, block_tokens, blocks_of
from jaxserve.replicas.replica import Load, Replica
from jaxserve.replicas.router import SHARE, Router, groups_of
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams

PAGE = 16
BLOCK = LEAST_BLOCK


def request(ids, new=10, group="", namespace="", keys=None):
    return Request(
        rid="r",
        index=0,
        prompt_ids=ids,
        params=SamplingParams(),
        max_new_tokens=new,
        stop_ids=frozenset(),
        masked_ids=(),
        seed=0,
        sample_index=0,
        mailbox=Mailbox(),
        group=group,
        namespace=namespace,
        prompt_keys=keys,
    )


def tokens(seed, count):
    draw = random.Random(seed)
    return [draw.randrange(1 << 17) for _ in range(count)]


def replicas(count):
    made = [Replica(rank, [rank]) for rank in range(count)]
    for replica in made:
        replica.run_by(types.SimpleNamespace(tokens_done=0))  # type: ignore[arg-type]
    return made


def router(method="auto", count=2, cached=10_000):
    return Router(method, PAGE, cached, count)


def place(router, there, *requests):
    """The ranks that each prompt got, in order."""
    groups = groups_of(requests)
    parts = router.route(groups, there)
    return [
        next(replica.rank for replica, part in parts.items() if any(g is group for g in part))
        for group in groups
    ]


# -- prefixes -------------------------------------------------------------------------------------


def test_blocks_are_whole_pages():
    assert [block_tokens(page) for page in (8, 16, 24, 64, 128)] == [64, 64, 72, 64, 128]


@pytest.mark.parametrize("seed", range(20))
def test_a_match_is_the_longest_common_prefix_in_blocks(seed):
    draw = random.Random(seed)
    index, known = PrefixIndex(1000), []
    base = tokens(seed, 600)
    for _ in range(30):
        cut = draw.randrange(600)
        prompt = base[:cut] + tokens(draw.random(), draw.randrange(1, 300))
        common = max((shared(prompt, other) for other in known), default=0)
        most = (len(prompt) - 1) // BLOCK
        assert index.match(blocks_of(request(prompt), BLOCK)) == min(common // BLOCK, most)
        index.add(blocks_of(request(prompt), BLOCK))
        known.append(prompt[: most * BLOCK])


def shared(left, right):
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def test_namespaces_and_keys_are_told_apart():
    ids = tokens(0, 200)
    index = PrefixIndex(100)
    index.add(blocks_of(request(ids), BLOCK))
    assert index.match(blocks_of(request(ids, namespace="salt"), BLOCK)) == 0
    assert index.match(blocks_of(request([0] * 200, keys=ids), BLOCK)) == 3
    assert index.match(blocks_of(request(ids, keys=tokens(1, 200)), BLOCK)) == 0


def test_what_was_used_longest_ago_is_forgotten_first():
    index = PrefixIndex(6)
    first, second, third = (blocks_of(request(tokens(n, 193)), BLOCK) for n in range(3))
    index.add(first)
    index.add(second)
    index.add(first)
    index.add(third)
    assert (len(index), index.match(first), index.match(second)) == (6, 3, 0)
    index.add(second[:1])
    assert index.match(third) == 3 and index.match(first) == 2, "the end of a prefix goes first"
    index.clear()
    assert len(index) == index.match(third) == 0


# -- methods --------------------------------------------------------------------------------------


def test_unknown_prompts_go_to_the_least_busy():
    there, route = replicas(3), router(count=3)
    sizes = [100, 100, 100, 500, 20, 20, 20, 300]
    loads, expected = [0, 0, 0], []
    for size in sizes:
        least = loads.index(min(loads))
        expected.append(least)
        loads[least] += size + 10
    assert place(route, there, *(request(tokens(n, s)) for n, s in enumerate(sizes))) == expected
    assert [replica.load.tokens for replica in there] == loads


def test_a_known_prefix_is_followed_until_much_more_is_to_be_done_there():
    there, route = replicas(2), router()
    prefix = tokens(0, 4 * BLOCK + 1)
    assert place(route, there, request(prefix)) == [0]
    there[0].ended(request(prefix))
    matched = 4 * BLOCK
    for least in (0, 1000):
        limit = int((1 + SHARE) * least) + matched
        for load, rank in ((limit, 0), (limit + 1, 1)):
            there, route = replicas(2), router()
            place(route, there[:1], request(prefix))
            there[0].ended(request(prefix))
            there[0].give([request([1], new=load - 1)])
            there[1].give([request([1], new=least - 1)])
            assert place(route, there, request(prefix)) == [rank]


def test_of_equal_prefixes_the_least_busy():
    there, route = replicas(2), router()
    prompts = [request([*tokens(0, 300), n], new=50) for n in range(20)]
    ranks = [place(route, there, prompt)[0] for prompt in prompts]
    assert abs(ranks.count(0) - 10) <= 1
    assert [replica.load.requests for replica in there] == [ranks.count(0), ranks.count(1)]


def test_samples_stay_together():
    there, route = replicas(2), router("round_robin")
    many = [request([n], group=f"g{n}") for n in range(3) for _ in range(4)]
    assert place(route, there, *many, request([7]), request([8])) == [0, 1, 0, 1, 0]
    assert [r.dp_rank for r in many] == [0] * 4 + [1] * 4 + [0] * 4


def test_the_other_methods_look_at_nothing_else():
    sizes = (500, 10, 10, 10)
    prompts = [request(tokens(n, size)) for n, size in enumerate(sizes)]
    assert place(router("round_robin"), replicas(2), *prompts) == [0, 1, 0, 1]
    assert place(router("total_requests"), replicas(2), *prompts) == [0, 1, 1, 0]
    assert place(router("total_tokens"), replicas(2), *prompts) == [0, 1, 1, 1]
    same = [request(tokens(0, 300)), request(tokens(0, 300))]
    assert place(router("total_requests"), replicas(2), *same) == [0, 1]


def test_a_load_is_what_is_left_to_do():
    (replica,) = replicas(1)
    requests = [request([1] * 100, new=50), request([1] * 10, new=40)]
    replica.give(requests)
    assert replica.load == Load(2, 200)
    slots = Slots(4)
    slots.most_kv[:2] = 110, 7
    replica.loop.tokens_done = int(slots.most_kv.sum())  # type: ignore[misc]
    assert replica.load == Load(2, 83)
    replica.ended(requests[0])
    replica.loop.tokens_done = 7  # type: ignore[misc]
    assert replica.load == Load(1, 43)
    replica.take_back(requests[1:])
    assert replica.load == Load(0, 0)


def test_prompts_that_were_refused_count_nowhere():
    there, route = replicas(2), router()
    groups = groups_of([request([n]) for n in range(4)])
    for replica, part in route.route(groups, there).items():
        route.take_back(part, replica)
    assert [replica.load for replica in there] == [Load(), Load()]


# -- counters -------------------------------------------------------------------------------------


def row(rank, scale, status="ready"):
    """Counters of one replica, all of them multiples of `scale`."""
    numbers = dict.fromkeys((*totals.COUNTED, *totals.PRESENT), scale)
    nested = {
        "finished_requests": {"stop": scale, "length": 2 * scale},
        "latencies": {"e2e": {"bounds": [0.1, 1.0], "counts": [scale, 0, scale], "sum": scale}},
        "host_seconds": {"schedule": scale, "commit": scale},
        "memory_usage": {"weight": scale},
    }
    same = {"page_size": 16, "num_continuous_decode_steps": 1, "context_length": 64}
    same["all_reduce"] = "none: one device"
    ladders = {"decode_buckets": [1, 2, 4][: 3 - rank], "extend_buckets": [64]}
    return {**numbers, **nested, **same, **ladders, "dp_rank": rank, "status": status}


def test_totals_are_sums():
    result = totals.total([row(0, 1), row(1, 10)])
    assert result["generated_tokens"] == result["num_running"] == 11
    assert result["finished_requests"] == {"stop": 11, "length": 22}
    histogram = {"bounds": [0.1, 1.0], "counts": [11, 0, 11], "sum": 11}
    assert result["latencies"] == {"e2e": histogram}
    assert result["decode_buckets"] == [1, 2] and result["page_size"] == 16
    assert result["host_ms_per_step"] == 1e3 * 22 / 22


def test_a_failed_replica_counts_for_the_past_alone():
    result = totals.total([row(0, 1), row(1, 10, "failed")])
    assert result["generated_tokens"] == 11 and result["num_running"] == 1
    never_read = {"dp_rank": 2, "status": "failed"}
    assert totals.total([row(0, 1), never_read])["generated_tokens"] == 1
