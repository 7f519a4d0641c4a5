"""The scheduler and the page allocator against brute-force models, under random operations."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cache.host import HostPages
from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.window import Window
from jaxserve.errors import OutOfPagesError
from jaxserve.media.picture import Picture, PromptMedia
from jaxserve.output.commit import commit, finish
from jaxserve.output.ends import Ends
from jaxserve.output.logprobs import Logprobs, LogprobSpec
from jaxserve.output.picked import on_host
from jaxserve.output.states import HiddenStates, LayerHiddenStates, Logits, StateExtra, StateSpec
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.packing.buckets import Buckets
from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Slots
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.policy import Policy, WaitingQueue
from jaxserve.scheduler.scheduler import DrainNeeded, Scheduler
from jaxserve.scheduler.scheduling import Scheduling
from jaxserve.step.picking import Picker
from tests.oracles.paged_device import PagedDevice, next_token
from tests.oracles.payloads import (
    Marks,
    MarkSpec,
    kept_states,
    pick,
    prompt_payloads,
    sampled_payloads,
)


class Sink:
    """A mailbox that keeps what it is given."""

    def __init__(self):
        self.updates = []

    def put(self, update):
        self.updates.append(update)


def make_request(rid, prompt, new, sample=0, group="", stops=(), interval=0, **fields):
    fields = {"params": SamplingParams(), **fields}
    return Request(
        rid=rid, index=0, prompt_ids=prompt, max_new_tokens=new, stop_ids=frozenset(stops),
        stream_interval=interval, masked_ids=(), seed=0, sample_index=sample, mailbox=Sink(),
        group=group, **fields,
    )  # fmt: skip


@dataclasses.dataclass
class Result:
    batch: Batch
    tokens: np.ndarray
    payloads: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt_payloads: dict[str, Any] = dataclasses.field(default_factory=dict)
    accepted: np.ndarray | None = None
    kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def drawn(self):
        return self.tokens, {name: on_host(array) for name, array in self.payloads.items()}


class Machine:
    """Scheduler, device and commit, with `depth` steps in flight."""

    def __init__(
        self, pages, page_size, rows, tokens, depth, steps=1, window=None, host=None,
        accepts=None, **options,
    ):  # fmt: skip
        """accepts: the random.Random by which rows of several decode steps have fewer tokens."""
        self.page_size, self.window, self.accepts = page_size, window, accepts
        self.device = PagedDevice(page_size, window)
        alignment = options.get("chunk_alignment", 1)
        fitting = Window.fitting(window, page_size, pages, alignment)
        self.host = None if host is None else HostPages(*host)
        scheduling = Scheduling(
            buckets=Buckets.make(rows, tokens), page_size=page_size, max_rows=rows,
            max_prefill_tokens=tokens, steps_per_dispatch=steps, pending=16, **options,
        )  # fmt: skip
        self.scheduler = Scheduler(scheduling, PageAllocator(pages), window=fitting, host=self.host)
        self.depth = depth
        self.alignment = alignment
        self.in_flight: deque[Result] = deque()
        self.picker = Picker(pick)
        self.ends = Ends(lambda result, places: self.picker.ends(result.batch, result.kept, places))

    def step(self):
        try:
            batch = self.scheduler.schedule()
        except DrainNeeded:
            batch = None
        if batch is not None:
            assert len(batch.sequences) <= batch.row_bucket
            self.check_cuts(batch)
            if self.host is not None:
                self.device.copy(self.host.take())
            accepted = None
            if self.accepts is not None and isinstance(batch, DecodeBatch):
                rows = len(batch.sequences)
                accepted = np.array([self.accepts.randint(1, batch.steps) for _ in range(rows)])
            tokens = self.device.run(batch, accepted)
            kept = kept_states(batch, tokens)
            payloads = sampled_payloads(batch, tokens) | self.picker.sampled(batch, kept)
            prompts = prompt_payloads(batch, self.picker)
            self.in_flight.append(Result(batch, tokens, payloads, prompts, accepted, kept))
        if self.in_flight and (batch is None or len(self.in_flight) > self.depth):
            result = self.in_flight.popleft()
            self.ends.hand_out()
            commit(result, self.scheduler, self.ends.of(result))
            self.ends.gather()
            if not self.in_flight:
                self.ends.hand_out()
        self.check()
        return batch

    def fail(self):
        """The device loses everything, as `EngineLoop` has it."""
        self.ends.hand_out()
        self.in_flight.clear()
        self.scheduler.retract_all()
        self.device = PagedDevice(self.page_size, self.window)
        self.check()

    def check_cuts(self, batch):
        """Chunks are cut at multiples of the alignment; what is to be decoded again runs in no
        chunk."""
        if not isinstance(batch, ExtendBatch):
            return
        for row in batch.rows:
            end = row.sequence.prompt_len if self.scheduler.slots.replays else 1 << 30
            assert row.stop <= end
            if row.leader < 0:
                assert row.start % self.alignment == 0
                assert row.stop % self.alignment == 0 or row.samples

    def check(self):
        """Every page is free or cached, or held as often as its count says; slots are held once."""
        scheduler = self.scheduler
        tree, references = scheduler.pages.tree, scheduler.pages.allocator._references
        held = Counter(p for s in scheduler.live.values() for p in s.pages[s.dropped :])
        cached = Counter(p for node in tree._nodes() for p in node.pages)
        assert tree.size == cached.total() == len(cached)
        assert all(references[page] == (held + cached)[page] for page in range(len(references)))
        unused = sum(not held[page] for page in range(len(references)))
        assert scheduler.pages.available == unused  # what is locked is really used
        slots = [s.slot for s in scheduler.live.values() if s.admitted]
        assert len(slots) == len(set(slots))
        for s in scheduler.live.values():
            assert len(s.pages) * scheduler.page_size >= s.most_kv
            assert not (s.dropped and s.lease.count)
            assert s.most_kv <= s.total_tokens + s.in_flight

    def run_dry(self):
        for _ in range(20_000):
            if self.scheduler.idle and not self.in_flight:
                return
            self.step()
        raise AssertionError("the machine does not come to rest")


def expected_tokens(request):
    start, tokens = len(request.prompt_ids), []
    while len(tokens) < request.max_new_tokens and not request.stop_ids & set(tokens):
        tokens.append(next_token(request.rid, request.sample_index, start + len(tokens)))
    return tokens


def check_extras(request):
    """Each extra has been told of every output once, and of the prompt once and whole."""
    told = [(extra, extra.collect()) for extra in request.extras]
    for update in request.mailbox.updates:
        for (_, collected), news in zip(told, update.extras, strict=True):
            assert collected.prompt is None or news.prompt is None
            collected.add(news)
    outputs, prompt = request.output_ids, request.prompt_ids
    if request.unemitted_id is not None:
        outputs = [request.unemitted_id]
    for extra, collected in told:
        if isinstance(extra, StateExtra):
            aborted = request.finish_reason["type"] == "abort"
            check_states(extra, collected, prompt, outputs, aborted)
            continue
        if isinstance(extra, Marks):
            assert collected.output == [token + 0.5 for token in outputs]
            expected = [prompt[position] + 0.5 for position in extra.prompt]
        else:
            assert collected.output == Logprobs([-float(token) for token in outputs])
            rest = prompt[extra.spec.start :] if extra.spec.start >= 0 else []
            expected = Logprobs([-float(token) if i else None for i, token in enumerate(rest)])
        assert collected.prompt == expected or (collected.prompt is None and not outputs)


def check_states(extra, collected, prompt, outputs, aborted):
    """Of the last position, or of all from which a token was drawn; the first of them is among the
    prompt's, where those are wanted."""
    rows = [row.tolist() for row in collected.output]
    if extra.at_end:
        assert rows == ([[outputs[-1] + 0.5]] if outputs and not aborted else [])
        return
    whole = bool(extra.prompt)
    assert rows == [[token + 0.5] for token in outputs[1 if whole else 0 :]]
    if not whole or collected.prompt is None:
        assert collected.prompt is None and not (whole and outputs)
    else:
        assert collected.prompt.tolist() == [[token + 0.5] for token in prompt]


def admitted(request):
    return request.admitted_time is not None


def draw_prompt(random_, earlier, longest):
    """Fresh tokens, behind a part of an earlier request's prompt and output, or of common text."""
    fresh = [random_.randrange(1000) for _ in range(random_.randint(1, 60))]
    head = []
    if earlier and random_.random() < 0.6:
        request = random_.choice(earlier)
        head = request.prompt_ids + request.output_ids
    elif random_.random() < 0.5:
        head = list(range(50))
    head = head[: random_.choice([len(head), random_.randint(0, len(head))])]
    fresh = fresh[: random_.choice([1, 60])] if head else fresh
    return (head + fresh)[-longest:] if random_.random() < 0.3 else (head + fresh)[:longest]


PICTURES = [Picture(tokens, bytes([tokens])) for tokens in (1, 3, 8, 20)]
LARGEST = PICTURES[-1].tokens


def show_pictures(random_, longest, blocks):
    """A prompt of texts and pictures, and its media."""
    ids, owners, offsets, keys, pictures, reach = [], [], [], [], [], []
    for _ in range(random_.randint(1, 6)):
        picture = random_.choice(PICTURES)
        text = random_.randint(1, 12)
        if len(ids) + text + picture.tokens > longest:
            break
        ids += range(text)
        owners += [-1] * text
        offsets += [0] * text
        reach += range(len(reach), len(reach) + text)
        ids += [1000 * picture.tokens + i for i in range(picture.tokens)]
        owners += [len(pictures)] * picture.tokens
        offsets += range(picture.tokens)
        reach += [len(ids) - 1] * picture.tokens
        pictures.append(picture)
    ids, owners, offsets = ids or [0], owners or [-1], offsets or [0]
    keys = [-token if owner >= 0 else token for token, owner in zip(ids, owners, strict=True)]
    arrays = [np.array(x, np.int32) for x in (owners, offsets, keys, reach or [0])]
    media = PromptMedia(tuple(pictures), *arrays[:3], reach=arrays[3] if blocks else None)
    return ids, {"media": media, "prompt_keys": keys}


FULL, LAST = (
    [StateSpec(kind, last, 1) for kind in (HiddenStates, LayerHiddenStates, Logits)]
    for last in (False, True)
)
STATE_SPECS = [tuple(FULL), tuple(LAST), (*FULL[:2], LAST[2]), (*LAST[:2], MarkSpec(0)), (FULL[2],)]
POLICIES = [
    Policy(), Policy(schedule="lpm"), Policy(conservativeness=0), Policy(conservativeness=3.5),
    Policy(priorities=True, threshold=1), Policy(priorities=True, low_first=True, threshold=0),
]  # fmt: skip
PACES = [
    None, Pace(8), Pace(16, 0.1, 1), Pace(24, 0, 24), Pace(64, 0.02, 24, 16), Pace(48, 0.001, 9, 24)
]  # fmt: skip


TRAFFIC = given(
    seed=st.integers(0, 2**32),
    pages=st.integers(6, 40),
    page_size=st.sampled_from([8, 16]),
    rows=st.integers(1, 12),
    tokens=st.sampled_from([8, 24, 64, 200]),
    depth=st.sampled_from([0, 1]),
    steps=st.sampled_from([1, 1, 3, 4, 8]),
    aborts=st.booleans(),
    partial=st.booleans(),
    eviction=st.sampled_from([None, "lru", "lru", "lfu"]),
    policy=st.sampled_from(POLICIES),
    pace=st.sampled_from(PACES),
    replays=st.booleans(),
    aligned_pages=st.sampled_from([0, 0, 1, 2]),
    window=st.sampled_from([None, None, 1, 7, 16, 33, 100]),
    host=st.sampled_from([None, (1, 1), (2, 3), (5, 4), (40, 8)]),
    shows=st.sampled_from(["", "", "cut", "whole"]),
)


def traffic(
    seed, pages, page_size, rows, tokens, depth, steps, aborts, partial, eviction, policy, pace,
    replays, aligned_pages, window, host, shows,
):  # fmt: skip
    random_ = random.Random(seed)
    if shows == "whole":  # a step has room for a picture
        tokens, aligned_pages, window = max(tokens, 24), 0, None
        pace = pace if pace is not None and pace.work - 8 * pace.riders >= 24 else None
    host = host if eviction else None
    alignment = aligned_pages * page_size or 1
    machine = Machine(
        pages, page_size, rows, max(tokens, alignment), depth, steps, window, host,
        eviction=eviction, policy=policy, pace=None if replays or aligned_pages else pace,
        chunk_alignment=alignment, replays=replays,
        media_rows=max(tokens, alignment) + 2 * LARGEST if shows else 0,
        accepts=random_ if partial and window is None and pace is None else None,
    )  # fmt: skip
    requests, aborted = [], set()
    slides = Window.fitting(window, page_size, pages, alignment) is not None
    capacity = 350 if slides else pages * page_size
    for number in range(random_.randint(1, 12)):
        prompt = draw_prompt(random_, requests, min(capacity - 1, 200))
        new = random_.randint(0, min(capacity - len(prompt), 150))
        samples = random_.choice([1, 1, 3])
        group = f"group{number}" if samples > 1 else ""
        # more end tokens than are compared at once, too
        stops = random_.sample(range(1000), random_.choice([0, 3, 8, 9, 60]))
        interval = random_.choice([0, 0, 1, 5])
        start = random_.choice([-1, 0, random_.randint(0, len(prompt))])
        fields = {
            "priority": random_.choice([None, -2, 0, 3]),
            "namespace": random_.choice(["", "", "salt=1:x;"]),
            "params": SamplingParams(frequency_penalty=random_.choice([0, 0, 0.5])),
        }
        asked = [(LogprobSpec(start), MarkSpec(start)), (MarkSpec(start),), *STATE_SPECS]
        specs = random_.choice([(), random_.choice(asked)])
        if shows and random_.random() < 0.7:
            prompt, shown = show_pictures(random_, min(capacity - 1, 200), shows == "whole")
            fields |= shown
            new, specs = min(new, capacity - len(prompt)), ()
        for sample in range(samples):
            fields["extras"] = tuple(spec.extra(len(prompt)) for spec in specs)
            requests.append(
                make_request(f"r{number}", prompt, new, sample, group, stops, interval, **fields)
            )
            machine.scheduler.add(requests[-1])
            for _ in range(random_.choice([0, 0, 2, 40])):
                machine.step()
            if aborts and random_.random() < 0.3:
                victim = random_.choice(requests)
                if victim in machine.scheduler.live:
                    finish(victim, {"type": "abort"}, machine.scheduler)
                    aborted.add(victim)
                    machine.check()
        if random_.random() < 0.05:
            machine.scheduler.forget_prefixes()
            machine.check()
        if random_.random() < 0.05:
            machine.fail()
    machine.run_dry()
    assert machine.scheduler.pages.available == pages
    assert len(machine.scheduler.waiting) == 0 and machine.scheduler.waiting.siblings(group) == []
    for request in requests:
        if request in aborted:
            assert request.output_ids == expected_tokens(request)[: len(request.output_ids)]
        else:
            assert request.output_ids == expected_tokens(request)
        updates = request.mailbox.updates
        assert [u.finish_reason is None for u in updates] == [True] * (len(updates) - 1) + [False]
        assert [token for u in updates for token in u.new_ids] == request.output_ids
        check_extras(request)
        bulky = any(extra.bulky for extra in request.extras)
        assert request.stream_interval or len(updates) == 1 or bulky
        assert request.cached_tokens <= len(request.prompt_ids) - 1
        assert request.cached_tokens % page_size == 0
        assert (request.cached_host_tokens is None) == (host is None or not admitted(request))
        assert request.group or request.cached_tokens % alignment == 0


test_random_traffic_reads_its_own_tokens = settings(max_examples=40, deadline=None)(
    TRAFFIC(traffic)
)
test_more_random_traffic_does = pytest.mark.long(
    settings(max_examples=200, deadline=None)(TRAFFIC(traffic))
)


@pytest.mark.parametrize("steps", [1, 4])
def test_retraction_happens_and_is_invisible(steps):
    machine = Machine(pages=8, page_size=8, rows=4, tokens=64, depth=1, steps=steps)
    requests = [make_request(f"r{i}", [1] * 7, 40) for i in range(4)]
    for request in requests:
        machine.scheduler.add(request)
    machine.run_dry()
    assert sum(r.num_retractions for r in requests) > 0
    assert all(r.output_ids == expected_tokens(r) for r in requests)


def decode_batches(machine):
    """All batches until the machine comes to rest, but for those of prompts."""
    found = []
    while not machine.scheduler.idle or machine.in_flight:
        batch = machine.step()
        if isinstance(batch, DecodeBatch):
            found.append(batch)
    return found


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_are_scheduled_at_once_while_everybody_has_so_many_to_go(depth):
    machine = Machine(pages=40, page_size=8, rows=4, tokens=64, depth=depth, steps=4)
    long, short = make_request("long", [1] * 7, 22), make_request("short", [2] * 13, 7)
    machine.scheduler.add(long)
    machine.scheduler.add(short)
    batches = decode_batches(machine)
    rows = [(len(batch.sequences), batch.steps) for batch in batches]
    assert rows == [(2, 4), (2, 1), (2, 1), *[(1, 4)] * 3, (1, 1), (1, 1), (1, 1)]
    pages = [page for batch in batches for page in batch.new_pages]
    assert len(pages) == 3 + 1  # 7 + 21 tokens in pages of 8, 13 + 6 in one more than before
    assert [r.output_ids for r in (long, short)] == [expected_tokens(r) for r in (long, short)]


def test_single_steps_use_up_the_last_pages_before_anybody_is_retracted():
    machine = Machine(pages=4, page_size=8, rows=2, tokens=64, depth=1, steps=4)
    requests = [make_request(f"r{i}", [i] * length, 30 - length) for i, length in ((0, 6), (1, 8))]
    for request in requests:
        machine.scheduler.add(request)
    steps = [batch.steps for batch in decode_batches(machine)]
    assert 1 in steps and 4 in steps
    assert [r.output_ids for r in requests] == [expected_tokens(r) for r in requests]
    assert sum(r.num_retractions for r in requests) == 1


@pytest.mark.parametrize("interval", [0, 1])
def test_tokens_after_an_end_inside_a_dispatch_are_dropped(interval):
    machine = Machine(pages=40, page_size=8, rows=4, tokens=64, depth=1, steps=4)
    stop = next_token("ends", 0, 5 + 6)  # its seventh token at the latest, amid a dispatch
    requests = [
        make_request("ends", [1] * 5, 40, stops=[stop], interval=interval),
        make_request("stays", [1] * 5, 41, interval=interval),
    ]
    for request in requests:
        machine.scheduler.add(request)
    batches = decode_batches(machine)
    assert [r.output_ids for r in requests] == [expected_tokens(r) for r in requests]
    assert len(requests[0].output_ids) <= 7
    assert {batch.steps for batch in batches} == {4}
    for request in requests:
        expected = len(request.output_ids) if interval else 1
        assert len(request.mailbox.updates) == expected
    assert machine.scheduler.pages.available == 40


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("interval", [0, 1])
def test_what_is_retracted_may_have_to_decode_again(depth, interval):
    """Extend steps then run prompts only; callers hear of each token once."""
    machine = Machine(
        pages=14, page_size=8, rows=4, tokens=64, depth=depth, replays=True, chunk_alignment=16
    )
    requests = [
        make_request(f"r{i}", [100 * i + j for j in range(20)], 60, interval=interval)
        for i in range(3)
    ]
    for request in requests:
        machine.scheduler.add(request)
    machine.run_dry()
    retracted = sum(request.num_retractions for request in requests)
    assert retracted > 0
    # 16 of the 20 are cached, until somebody needs their pages
    assert 4 * retracted <= machine.device.tokens_run - 3 * 20 < 20 * retracted
    assert machine.scheduler.pages.cached <= 3 * 2  # pages: of prompts only
    for request in requests:
        assert request.output_ids == expected_tokens(request)
        told = [token for update in request.mailbox.updates for token in update.new_ids]
        assert told == request.output_ids


def test_who_has_decoded_much_comes_back_when_there_is_room_for_that():
    machine = Machine(pages=14, page_size=8, rows=4, tokens=64, depth=0, replays=True)
    first, second = (make_request(f"r{i}", [i], 80) for i in range(2))
    for request in (first, second):
        machine.scheduler.add(request)
    machine.run_dry()
    assert (first.num_retractions, second.num_retractions) == (0, 1)


def test_samples_of_a_prompt_prefill_once():
    machine = Machine(pages=40, page_size=8, rows=8, tokens=64, depth=1)
    requests = [make_request("r", list(range(21)), 5, sample, "g") for sample in range(4)]
    for request in requests:
        machine.scheduler.add(request)
    batch = machine.step()
    assert sum(row.stop - row.start for row in batch.rows) == 21
    assert len(batch.page_copies) == 3
    sequences = [machine.scheduler.live[r] for r in requests]
    assert all(s.pages[:2] == sequences[0].pages[:2] for s in sequences)
    assert len({s.pages[2] for s in sequences}) == 4
    machine.run_dry()


def test_long_prompts_run_in_chunks():
    machine = Machine(pages=40, page_size=8, rows=2, tokens=64, depth=0)
    request = make_request("r", list(range(150)), 1)
    machine.scheduler.add(request)
    rows = [machine.step().rows[0] for _ in range(3)]
    assert [(r.start, r.stop, r.samples) for r in rows] == [
        (0, 64, False), (64, 128, False), (128, 150, True),
    ]  # fmt: skip


def test_recovery_recomputes_everything_admitted():
    machine = Machine(pages=40, page_size=8, rows=4, tokens=64, depth=1)
    requests = [make_request(f"r{i}", [i] * 9, 12) for i in range(3)]
    for request in requests:
        machine.scheduler.add(request)
    for _ in range(5):
        machine.step()
    assert machine.scheduler.slots.in_flight
    machine.in_flight.clear()
    machine.scheduler.retract_all()
    assert not machine.scheduler.slots.in_flight  # or a pool that runs short would drain for ever
    machine.device = PagedDevice(8)
    machine.run_dry()
    assert all(r.output_ids == expected_tokens(r) for r in requests)


def test_recovery_from_a_half_changed_state():
    """As an exception in the middle of `schedule` may leave it: pages that nobody has, and
    sequences in no queue."""
    machine = Machine(pages=40, page_size=8, rows=4, tokens=64, depth=1)
    requests = [make_request(f"r{i}", [i] * 9, 12) for i in range(6)]
    for request in requests:
        machine.scheduler.add(request)
    for _ in range(3):
        machine.step()
    scheduler = machine.scheduler
    scheduler.running.leave(next(iter(scheduler.running)))
    scheduler.waiting.remove(scheduler.waiting.first())
    scheduler.pages.allocate(3)
    scheduler.pages.share(scheduler.live[requests[0]].pages)
    scheduler.live[requests[1]].pages.pop()
    scheduler.finish(requests[0])
    machine.in_flight.clear()
    scheduler.retract_all()
    assert [s.request for s in scheduler.waiting] == requests[1:]
    assert scheduler.pages.available == 40 and scheduler.slots.available == 4
    machine.device = PagedDevice(8)
    machine.run_dry()
    assert all(r.output_ids == expected_tokens(r) for r in requests[1:])
    assert scheduler.pages.available == 40 and scheduler.slots.available == 4


def finished_in(machine, requests):
    """Their names in the order in which they end."""
    order = []
    for request in requests:
        machine.scheduler.add(request)
    while not machine.scheduler.idle:
        machine.step()
        order += [r.rid for r in requests if r.finished and r.rid not in order]
    assert all(r.output_ids == expected_tokens(r) for r in requests)
    return "".join(order)


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (Policy(), "abcdef"),
        (Policy(priorities=True, threshold=99), "dfbaec"),
        (Policy(priorities=True, threshold=99, default_priority=1), "dfbcae"),
        (Policy(priorities=True, low_first=True, threshold=99), "eabfdc"),
    ],
)
def test_the_order_of_the_queue(policy, order):
    priorities = {"a": 0, "b": 1, "c": None, "d": 9, "e": -4, "f": 3}
    machine = Machine(pages=40, page_size=8, rows=1, tokens=64, depth=1, policy=policy)
    requests = [make_request(rid, [1] * 9, 5, priority=p) for rid, p in priorities.items()]
    assert finished_in(machine, requests) == order


@pytest.mark.parametrize(("urgent", "retracted"), [(10, 0), (11, 1)])
@pytest.mark.parametrize("scarce", ["slots", "pages"])
def test_preemption_takes_more_than_the_threshold(urgent, retracted, scarce):
    rows, pages = (2, 40) if scarce == "slots" else (4, 6)
    policy = Policy(priorities=True, threshold=10)
    machine = Machine(pages=pages, page_size=8, rows=rows, tokens=64, depth=1, policy=policy)
    low, middle = (make_request(rid, [1, i] * 4, 12, priority=i) for i, rid in enumerate("lm"))
    for request in (low, middle):
        machine.scheduler.add(request)
    for _ in range(4):
        machine.step()
    first = make_request("u", list(range(17)), 7, priority=urgent)
    machine.scheduler.add(first)
    for _ in range(3):
        machine.step()
    assert machine.scheduler.live[first].admitted == bool(retracted)
    machine.run_dry()
    assert (low.num_retractions, middle.num_retractions) == (retracted, 0)
    assert all(r.output_ids == expected_tokens(r) for r in (low, middle, first))


def test_pages_are_given_back_by_the_least_important_and_of_those_the_youngest():
    policy = Policy(priorities=True, threshold=99, conservativeness=0)
    machine = Machine(pages=9, page_size=8, rows=4, tokens=64, depth=1, policy=policy)
    ranks = {"a": 1, "b": 0, "c": 1, "d": 0}
    requests = [make_request(rid, [i] * 9, 30, priority=ranks[rid]) for i, rid in enumerate("abcd")]
    for request in requests:
        machine.scheduler.add(request)
    order = []
    while len(order) < 3:
        machine.step()
        order += [r.rid for r in requests if r.num_retractions and r.rid not in order]
    assert order == ["d", "b", "c"]
    machine.run_dry()


def test_a_growing_request_evicts_before_it_retracts():
    machine = Machine(pages=12, page_size=8, rows=2, tokens=64, depth=1)
    for i in range(4):
        machine.scheduler.add(make_request(f"old{i}", [i] * 17, 8))
        machine.run_dry()
    assert machine.scheduler.pages.allocator.available < 2
    request = make_request("r", [9] * 9, 80)
    machine.scheduler.add(request)
    machine.run_dry()
    assert request.num_retractions == 0


def test_what_was_retracted_is_mostly_still_there():
    machine = Machine(pages=40, page_size=8, rows=2, tokens=64, depth=0)
    request = make_request("r", list(range(60)), 40)
    machine.scheduler.add(request)
    for _ in range(30):
        machine.step()
    sequence = machine.scheduler.live[request]
    machine.scheduler.retract(sequence)
    assert machine.scheduler.pages.available == 40
    before = machine.device.tokens_run
    machine.run_dry()
    assert machine.device.tokens_run - before <= 8
    assert request.output_ids == expected_tokens(request) and request.cached_tokens == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_the_last_output_is_never_cached(depth):
    """Whether its KV is computed depends on what is in flight when it is read."""
    machine = Machine(pages=20, page_size=8, rows=2, tokens=64, depth=depth)
    machine.scheduler.add(make_request("r", [5] * 16, 16))
    machine.scheduler.add(make_request("s", [6] * 16, 99, stops=[next_token("s", 0, 31)]))
    machine.run_dry()
    assert machine.scheduler.pages.cached == 3 + 3


def test_conservativeness_leaves_room_to_grow():
    counts = []
    for conservativeness in (0, 1, 3, 100):
        policy = Policy(conservativeness=conservativeness)
        machine = Machine(pages=24, page_size=8, rows=12, tokens=200, depth=0, policy=policy)
        requests = [make_request(f"r{i}", [i] * 16, 17) for i in range(12)]
        for request in requests:
            machine.scheduler.add(request)
        machine.step()
        counts.append(12 - len(machine.scheduler.waiting))
        machine.run_dry()
        counts.append(sum(r.num_retractions for r in requests))
    # pages of a request: 2 at first, 4 in the end, or the reserve for 100 would be 1,200
    assert counts[0::2] == [12, 8, 6, 6]
    assert counts[1] > counts[3] > 0 == counts[5] == counts[7]


@pytest.mark.parametrize("short", ["slots", "pages"])
def test_a_queue_that_cannot_move_is_left_alone(short, monkeypatch):
    """A step with 1,000 waiting looks at none of them, until something is given back."""
    rows, pages = (2, 99) if short == "slots" else (8, 13)
    machine = Machine(pages=pages, page_size=16, rows=rows, tokens=200, depth=1)
    for i in range(1000):
        machine.scheduler.add(make_request(f"r{i}", [i] * 60, 30))
    for _ in range(4):
        machine.step()
    admission, tried = machine.scheduler.admission, []
    real = admission.admit
    monkeypatch.setattr(admission, "admit", lambda s: tried.append(s) or real(s))
    for _ in range(20):
        assert not isinstance(machine.step(), ExtendBatch)
    assert tried == []


@pytest.mark.parametrize("eviction", [None, "lru"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_window_slides_over_more_tokens_than_the_pool_holds(eviction, steps):
    machine = Machine(
        pages=24, page_size=8, rows=4, tokens=64, depth=1, steps=steps, window=20, eviction=eviction
    )
    requests = [make_request(f"r{i}", list(range(i, 30)), 1500) for i in range(3)]
    for request in requests:
        machine.scheduler.add(request)
    while not machine.scheduler.idle:
        machine.step()
        for sequence in machine.scheduler.running:
            shared = sequence.lease.count
            held = len(sequence.pages) - sequence.dropped
            assert held <= (4 if shared == 0 else (30 + 20 + 8) // 8 + 1)
    assert all(r.output_ids == expected_tokens(r) for r in requests)
    assert [r.num_retractions for r in requests] == [0, 0, 0]
    assert machine.scheduler.pages.available == 24


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_longer_than_the_pool_runs_in_a_ring_of_pages(depth):
    machine = Machine(pages=16, page_size=8, rows=2, tokens=64, depth=depth, window=20)
    request = make_request("r", list(range(1000)), 20)
    machine.scheduler.add(request)
    chunks = []
    while not machine.scheduler.idle:
        batch = machine.step()
        if isinstance(batch, ExtendBatch):
            chunks += [row.stop - row.start for row in batch.rows]
    assert sum(chunks) == 1000 and len(chunks) == 16
    assert request.output_ids == expected_tokens(request)
    assert machine.scheduler.pages.available == 16


@pytest.mark.parametrize("alignment", [1, 16])
def test_who_runs_in_a_ring_leaves_the_step_to_others_and_takes_their_tokens_along(alignment):
    """A ring for 32 tokens at a time, in steps of 160 with running requests in them."""
    machine = Machine(
        pages=16, page_size=8, rows=4, tokens=160, depth=1, window=90,
        pace=Pace(160, 0, 4) if alignment == 1 else None, chunk_alignment=alignment,
    )  # fmt: skip
    long, short = make_request("l", list(range(600)), 5), make_request("s", [7] * 9, 30, interval=1)
    machine.scheduler.add(long)
    machine.step()
    machine.scheduler.add(short)
    machine.run_dry()
    assert [r.output_ids for r in (long, short)] == [expected_tokens(r) for r in (long, short)]
    assert machine.scheduler.pages.available == 16


def test_a_ring_too_small_for_an_aligned_chunk_is_none():
    assert Window.fitting(40, 8, 8, 16) == Window(40, 8)
    assert Window.fitting(40, 8, 8, 24) is None


@pytest.mark.parametrize("alignment", [1, 16])
def test_recovery_forgets_what_was_given_back_and_what_the_host_has(alignment):
    machine = Machine(
        pages=16, page_size=8, rows=2, tokens=64, depth=1, window=20, host=(8, 4),
        chunk_alignment=alignment, replays=alignment > 1,
    )  # fmt: skip
    for i in range(3):
        machine.scheduler.add(make_request(f"old{i}", [i] * 60, 2))
        machine.run_dry()
    assert len(machine.host) > 0
    request = make_request("r", list(range(300)), 200)
    machine.scheduler.add(request)
    for _ in range(60):
        machine.step()
    assert machine.scheduler.live[request].dropped > 0
    machine.fail()
    assert machine.scheduler.live[request].dropped == 0 == len(machine.host)
    assert machine.host.take() == ((), ())
    machine.run_dry()
    assert request.output_ids == expected_tokens(request)


def test_what_outgrew_the_pool_can_be_retracted():
    machine = Machine(pages=16, page_size=8, rows=2, tokens=64, depth=0, window=20)
    request = make_request("r", list(range(30)), 900)
    machine.scheduler.add(request)
    for _ in range(600):
        machine.step()
    machine.scheduler.retract(machine.scheduler.live[request])
    assert machine.scheduler.pages.available == 16
    machine.run_dry()
    assert request.output_ids == expected_tokens(request)


def test_samples_share_what_a_window_has_left_of_their_prompt():
    machine = Machine(pages=24, page_size=8, rows=4, tokens=64, depth=1, window=20)
    requests = [make_request("r", list(range(301)), 60, sample, "g") for sample in range(4)]
    for request in requests:
        machine.scheduler.add(request)
    machine.run_dry()
    assert machine.device.tokens_run == 301
    assert all(r.output_ids == expected_tokens(r) for r in requests)


def test_a_window_wider_than_the_pool_is_none():
    assert Window.fitting(None, 8, 100) is None
    assert Window.fitting(57, 8, 8) is None and Window.fitting(56, 8, 8) == Window(56, 8)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_the_queue_against_a_sorted_list(seed):
    random_ = random.Random(seed)
    queue, model, slots = WaitingQueue(), [], Slots(1)
    for arrival in range(80):
        if random_.random() < 0.7:
            request = make_request("r", [1], 1, group=random_.choice(["", "g", "h"]))
            sequence = Sequence(request, arrival, slots, random_.choice([-1, 0, math.inf]))
            queue.add(sequence)
            model.append(sequence)
        elif model:
            victim = random_.choice(model)
            queue.remove(victim)
            model.remove(victim)
            with pytest.raises(ValueError, match="does not wait"):
                queue.remove(victim)
        model.sort(key=lambda s: s.order)
        assert list(queue) == model and len(queue) == len(model)
        for group in "gh":
            assert set(queue.siblings(group)) == {s for s in model if s.request.group == group}
        if model:
            assert (queue.first(), queue.last()) == (model[0], model[-1])
            scores = {s: random_.randrange(3) for s in model}
            queue.prefer(scores.__getitem__)
            assert queue.first() is max(model[:128], key=scores.__getitem__)
            queue.prefer(lambda s: 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**32))
def test_page_allocator_against_a_counter(num_pages, seed):
    random_ = random.Random(seed)
    allocator = PageAllocator(num_pages)
    held: list[int] = []
    for _ in range(60):
        action = random_.random()
        if action < 0.5:
            count = random_.randint(0, 4)
            free = num_pages - len(set(held))
            if count > free:
                with pytest.raises(OutOfPagesError):
                    allocator.allocate(count)
            else:
                pages = allocator.allocate(count)
                assert not set(pages) & set(held)
                assert len(set(pages)) == count
                held += pages
        elif held:
            page = random_.choice(held)
            if action < 0.7:
                allocator.share([page])
                held.append(page)
            else:
                allocator.release([page])
                held.remove(page)
        assert allocator.available == num_pages - len(set(held))
    free = next((p for p in range(num_pages) if p not in held), None)
    if free is not None:
        with pytest.raises(ValueError, match="released more often"):
            allocator.release([free])
        with pytest.raises(ValueError, match="cannot be shared"):
            allocator.share([free])


def test_buckets_hold_what_they_are_asked_for():
    buckets = Buckets.make(max_rows=100, max_tokens=1000)
    assert buckets.decode[-1] == 100
    assert buckets.extend[-1] == 1000
    for rows in range(1, 101):
        assert buckets.decode_rows(rows) >= rows
    for tokens in range(1, 1001):
        bucket = buckets.extend_tokens(tokens)
        assert bucket >= tokens
        assert bucket in buckets.extend
        assert 8 <= buckets.extend_rows(bucket) <= max(bucket // 8, 8)


def test_a_fork_is_told_of_its_prompt_when_its_leader_was_aborted_meanwhile():
    machine = Machine(20, 8, 4, 64, 1)
    prompt = list(range(20))
    leader, fork = (
        make_request("r", prompt, 2, sample, "group", extras=(MarkSpec(0).extra(20),))
        for sample in range(2)
    )
    machine.scheduler.add(leader)
    machine.scheduler.add(fork)
    batch = machine.step()
    assert [row.leader for row in batch.rows] == [-1, 0]
    finish(leader, {"type": "abort"}, machine.scheduler)
    machine.run_dry()
    assert fork.output_ids == expected_tokens(fork)
    check_extras(fork)
