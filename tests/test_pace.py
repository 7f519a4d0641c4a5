"""How running requests fare while prompts come in, by the clock of a pretended H100."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from benchmarks.workloads import SHAPES
from jaxserve.config import EngineConfig
from jaxserve.models.registry import config_from_hf
from jaxserve.output.commit import commit, finish
from jaxserve.output.logprobs import LogprobSpec
from jaxserve.packing.batch import DecodeBatch, ExtendBatch
from jaxserve.scheduler.pace import Pace, attention_cost
from jaxserve.server_args import ServerArgs
from tests.machines import GPU, MACHINES
from tests.marks import long
from tests.oracles.payloads import prompt_payloads, sampled_payloads
from tests.test_scheduler import Machine, Result, expected_tokens, make_request

LLAMA = config_from_hf(SHAPES["llama-3.1-8b"])
PACE = Pace.of(LLAMA, 8192, GPU.pacing, mixed=None)
TOKEN_SECONDS = 2 * 7e9 / 600e12
"""Of an 8B model's products, on an H100."""
WEIGHTS_SECONDS = 5.5e-3


def seconds(batch):
    """A step's time: its products, at least the time to read the weights, and its attention."""
    if isinstance(batch, DecodeBatch):
        return WEIGHTS_SECONDS + 2e-3
    attended = sum(PACE.attending(row.start, row.stop - row.start) for row in batch.rows)
    return max(WEIGHTS_SECONDS, batch.tokens * TOKEN_SECONDS) + attended * TOKEN_SECONDS + 1e-3


class Clocked(Machine):
    """A machine with a large pool that says when each request's tokens come."""

    def __init__(self, pace, rows=256, tokens=8192, steps=1):
        super().__init__(4000, 64, rows, tokens, 1, steps, pace=pace)
        self.now = 0.0
        self.batches = []
        self.times: dict[str, list[float]] = {}

    def step(self):
        batch = super().step()
        if batch is None:
            return None
        self.batches.append(batch)
        self.now += seconds(batch)
        if isinstance(batch, DecodeBatch):
            drawn = batch.sequences
        else:
            drawn = [sequence for _, sequence in batch.sampled]
        for sequence in drawn:
            self.times.setdefault(sequence.request.rid, []).append(self.now)
        return batch

    def check(self):
        """Machine.check walks the whole pool: too slow here, and test_scheduler's."""

    def begin(self, *requests):
        for request in requests:
            self.scheduler.add(request)

    def until_token_of(self, rid):
        """Run; seconds until the first token of `rid`."""
        start = self.now
        while rid not in self.times:
            self.step()
        return self.times[rid][0] - start

    def gaps(self, rid, since):
        times = [t for t in self.times[rid] if t >= since]
        return [b - a for a, b in itertools.pairwise(times)]


def prompt(number, length):
    return [(number * 7919 + i) % 1000 for i in range(length)]


def streams(count, length=40, new=4000, interval=1):
    return [make_request(f"s{i}", prompt(i, length), new, interval=interval) for i in range(count)]


@pytest.fixture(scope="module")
def alone():
    """Seconds of a 100k-token prompt by itself."""
    machine = Clocked(PACE)
    machine.begin(make_request("long", prompt(99, 100_000), 2))
    return machine.until_token_of("long")


@pytest.mark.parametrize(("count", "rides"), [long(32, False), (24, True), long(1, True)])
def test_streams_go_on_while_a_long_prompt_comes_in(alone, count, rides):
    machine = Clocked(PACE)
    machine.begin(*streams(count))
    for _ in range(20):
        machine.step()
    arrival, before = machine.now, len(machine.batches)
    machine.begin(make_request("long", prompt(99, 100_000), 2))
    assert machine.until_token_of("long") <= 1.5 * alone
    gaps = sorted(gap for i in range(count) for gap in machine.gaps(f"s{i}", arrival))
    assert len(gaps) > 100 * count
    assert gaps[-1] <= 0.100
    during = machine.batches[before:]
    extends = [batch for batch in during if isinstance(batch, ExtendBatch)]
    assert all(batch.mixed == rides for batch in extends)
    if rides:
        assert len(extends) >= len(during) - 1
    else:  # the step in flight at the arrival, then one and one
        kinds = [isinstance(batch, ExtendBatch) for batch in during]
        assert not any(a and b for a, b in itertools.pairwise(kinds))


def test_streams_with_long_contexts_decode_in_steps_of_their_own():
    """Ten thousand tokens, of an 8B model."""
    for length, rides in ((9900, True), (10_400, False)):
        machine = Clocked(PACE)
        machine.begin(*streams(1, length))
        while "s0" not in machine.times:
            machine.step()
        machine.begin(make_request("long", prompt(99, 20_000), 2))
        machine.until_token_of("long")
        extends = [b for b in machine.batches[5:] if isinstance(b, ExtendBatch)]
        assert len(extends) > 8 and all(b.mixed == rides for b in extends)


def test_without_pace_streams_wait_for_the_whole_prompt(alone):
    machine = Clocked(None)
    machine.begin(*streams(32))
    for _ in range(20):
        machine.step()
    arrival = machine.now
    machine.begin(make_request("long", prompt(99, 100_000), 2))
    assert machine.until_token_of("long") == pytest.approx(alone, rel=0.02)
    machine.step()
    assert max(machine.gaps("s0", arrival)) >= alone


def test_short_prompts_pass_a_long_one(alone):
    """Their first token comes after a few steps, though others that are long wait before them."""
    machine = Clocked(PACE)
    machine.begin(*streams(8))
    for _ in range(20):
        machine.step()
    machine.begin(make_request("long", prompt(99, 90_000), 2))
    machine.begin(make_request("next", prompt(98, 90_000), 2))
    for number in range(20):
        rid = f"short{number}"
        machine.begin(make_request(rid, prompt(50 + number, 300), 20, interval=1))
        assert machine.until_token_of(rid) <= 0.3
    assert "long" not in machine.times
    waiting = [sequence.request.rid for sequence in machine.scheduler.waiting]
    assert waiting == ["next"]
    machine.until_token_of("long")
    assert machine.now <= 1.5 * alone


def test_a_medium_prompt_gets_half_of_the_steps_and_the_long_one_the_rest():
    machine = Clocked(dataclasses.replace(PACE, riders=0))
    machine.begin(*streams(1))
    machine.step()
    machine.begin(make_request("long", prompt(99, 60_000), 2))
    for _ in range(8):
        machine.step()
    machine.begin(make_request("medium", prompt(98, 6000), 2))
    before = len(machine.batches)
    machine.until_token_of("medium")
    chunks = [b for b in machine.batches[before:] if isinstance(b, ExtendBatch)]
    assert 5 <= len(chunks) <= 12
    for batch in chunks[1:-1]:
        work = {
            row.sequence.request.rid: row.stop - row.start
            + PACE.attending(row.start, row.stop - row.start)
            for row in batch.rows
        }  # fmt: skip
        assert work["medium"] <= 1024 and work["long"] >= 600


def kinds(machine):
    """What a machine runs until it rests: each batch's rows and steps, by name and position."""
    machine.run_dry()
    return [
        [(row.sequence.request.rid, row.start, row.stop) for row in batch.rows]
        if isinstance(batch, ExtendBatch)
        else ([s.request.rid for s in batch.sequences], batch.steps)
        for batch in machine.batches
    ]


@pytest.mark.parametrize("steps", [1, 4])
def test_prompts_submitted_together_run_before_anybody_decodes(steps):
    """256 x 512 tokens, nobody watching: 16 full steps, the same as without any pace."""
    found = []
    for pace in (None, PACE):
        machine = Clocked(pace, steps=steps)
        machine.begin(*(make_request(f"r{i}", prompt(i, 512), 9) for i in range(256)))
        found.append(kinds(machine))
    assert found[0] == found[1]
    assert [len(batch.rows) for batch in machine.batches[:16]] == [16] * 16
    assert [batch.tokens for batch in machine.batches[:16]] == [8192] * 16
    decodes = machine.batches[16:]
    assert [batch.steps for batch in decodes] == [steps] * (8 // steps)
    assert all(len(batch.sequences) == 256 for batch in decodes)


def test_ragged_prompts_with_few_rows_run_as_without_pace():
    lengths = [37 * i % 1000 + 1 for i in range(120)]
    found = []
    for pace in (None, PACE):
        machine = Clocked(pace, rows=24, tokens=2048)
        machine.begin(
            *(make_request(f"r{i}", prompt(i, n), n % 20 + 1) for i, n in enumerate(lengths))
        )
        found.append(kinds(machine))
    assert found[0] == found[1]


def test_decode_steps_come_between_the_steps_of_a_long_prompt_that_nobody_watches():
    machine = Clocked(dataclasses.replace(PACE, riders=0), tokens=1024)
    machine.begin(make_request("a", prompt(1, 60), 50))
    machine.step()
    machine.begin(make_request("b", prompt(2, 5000), 3))
    machine.until_token_of("b")
    sizes = [
        batch.rows[0].stop - batch.rows[0].start if isinstance(batch, ExtendBatch) else "decode"
        for batch in machine.batches[1:]
    ]
    # the first finds no prompt under way, the last leaves nothing to come
    assert sizes == [1024, 1024, "decode", 1024, "decode", 1024, "decode", 904]


def test_a_step_keeps_to_its_work_and_always_gets_on():
    """Whatever the context, and however small the pace."""
    for work in (8, 64, 512, 2048):
        pace = Pace(work, attention_cost(LLAMA, 1.3) * 10, 2, max(work // 4, 8))
        machine = Clocked(pace, rows=4)
        machine.begin(*streams(2))
        machine.step()
        machine.begin(make_request("long", prompt(99, 3000), 2))
        for _ in range(60):
            batch = machine.step()
            if isinstance(batch, ExtendBatch):
                row = batch.rows[0]
                count = row.stop - row.start
                assert count >= 8 or row.samples
                did = count + pace.attending(row.start, count)
                assert did <= max(work, pace.wave + pace.attending(row.start, pace.wave))


def test_a_prompt_under_way_gives_its_pages_to_those_before_it():
    """The younger one is retracted, though it is the older one that needs a page."""
    machine = Machine(15, 8, 4, 16, 1, pace=Pace(8))
    old = make_request("old", prompt(1, 8), 60, interval=1)
    young = make_request("young", prompt(2, 100), 2)
    machine.scheduler.add(old)
    for _ in range(3):
        machine.step()
    machine.scheduler.add(young)
    machine.scheduler.admission._margin = 0  # so that it is admitted at all
    machine.run_dry()
    assert (old.num_retractions, young.num_retractions >= 1) == (0, True)
    assert [r.output_ids for r in (old, young)] == [expected_tokens(r) for r in (old, young)]


def test_input_logprobs_of_a_chunk_in_flight_when_its_prompt_is_retracted():
    """They are dropped: the prompt runs again from where they are still missing."""
    machine = Machine(15, 8, 4, 16, 1, pace=Pace(8))
    request = make_request("r", prompt(2, 40), 2, extras=(LogprobSpec(0).extra(40),))
    machine.scheduler.add(request)
    batches = [machine.scheduler.schedule() for _ in range(2)]
    for number, batch in enumerate(batches):
        if number:
            machine.scheduler.retract(machine.scheduler.live[request])
        tokens = np.zeros((1, 1), np.int32)
        payloads = sampled_payloads(batch, tokens), prompt_payloads(batch, machine.picker)
        commit(Result(batch, tokens, *payloads), machine.scheduler, [])
        assert len(request.extras[0]._prompt) == (0 if number else 16)
    again = machine.scheduler.schedule()
    assert (again.rows[0].start, again.rows[0].fresh) == (0, True)


def test_a_decode_step_that_is_due_survives_an_abort():
    machine = Clocked(dataclasses.replace(PACE, riders=0))
    (stream,) = streams(1)
    machine.begin(stream)
    machine.step()
    machine.begin(make_request("long", prompt(99, 20_000), 2))
    assert isinstance(machine.step(), ExtendBatch)
    finish(stream, {"type": "abort"}, machine.scheduler)
    machine.run_dry()
    assert machine.scheduler.idle


# -- the arithmetic --------------------------------------------------------------------------------


def test_attending_to_a_context():
    pace = Pace(2048, 1e-4, wave=512)
    one_by_one = sum(1e-4 * (5000 + i + 0.5) for i in range(1024))
    assert pace.attending(5000, 1024) == pytest.approx(one_by_one)
    assert pace.attending(5000, 513) == pytest.approx(1e-4 * 1024 * (5000 + 513 / 2))


def test_attention_cost_of_an_8b_model():
    """FLOPs: 2 for each parameter of the layers, 4 for each head's dim a token attended to."""
    layers = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert attention_cost(LLAMA, 1.3) == pytest.approx(1.3 * (4 * 4096 * 32) / (2 * layers))
    windowed = dataclasses.replace(LLAMA, windows=(None,) * 8 + (4096,) * 24)
    assert attention_cost(windowed, 1.3) == pytest.approx(attention_cost(LLAMA, 1.3) / 4)


@pytest.mark.parametrize(
    ("platform", "options", "expected"),
    [
        ("gpu", {}, (2048, 24, 512)),
        ("cpu", {}, (256, 0, 64)),
        ("gpu", {"enable_mixed_chunk": False}, (2048, 0, 512)),
        ("cpu", {"enable_mixed_chunk": True}, (256, 24, 64)),
        ("gpu", {"enable_mixed_chunk": True, "chunked_prefill_size": 3000}, (752, 24, 376)),
        ("gpu", {"chunked_prefill_size": 1}, (8, 24, 8)),
    ],
)
def test_pace_of_an_engine(platform, options, expected):
    config = EngineConfig.resolve(ServerArgs("x", **options), LLAMA, MACHINES[platform], 1 << 30)
    assert config.pace is not None
    assert (config.pace.work, config.pace.riders, config.pace.wave) == expected
    assert config.pace.attention == attention_cost(LLAMA, 1.3)
    assert math.isinf(config.pace.reach) == bool(options.get("enable_mixed_chunk"))
    assert "pace" not in repr(config.program)


def test_no_pace_without_chunks():
    args = ServerArgs("x", chunked_prefill_size=-1, max_prefill_tokens=5000)
    config = EngineConfig.resolve(args, LLAMA, GPU, 1 << 30)
    assert config.pace is None and config.buckets.max_tokens == 5000
