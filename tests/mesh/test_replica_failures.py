"""A replica that fails gives its requests to the others: none is lost, none is answered twice."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

import jaxserve
from jaxserve.errors import EngineDeadError, RequestFailedError
from tests import inside
from tests.marks import long_but
from tests.mesh.test_replicas import OPTIONS, PROMPTS, SEEDED, logprobs, ranks
from tests.prompts import GREEDY, ids, text

pytestmark = pytest.mark.usefixtures("kept_programs")
CALL = {
    "input_ids": [*PROMPTS, text(3, 300)],
    "sampling_params": {**SEEDED, "max_new_tokens": 60, "n": 2},
}
WHOLE = {**CALL, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
STREAMED = {**SEEDED, "max_new_tokens": 80, "stream_interval": 1}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def expected(folder):
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        yield {
            "whole": engine.generate(**WHOLE),
            "streamed": engine.generate(input_ids=PROMPTS, sampling_params=STREAMED),
        }


@pytest.fixture
def engine(folder):
    with jaxserve.Engine(folder, dp_size=2, log_level="critical", **OPTIONS) as engine:
        yield engine


def break_down(engine, rank, steps, when=None):
    """Replica `rank` fails at its next step but `steps`, and at each one after it. when: an event
    that it waits for before."""
    loop = inside.replicas(engine)[rank]
    real, left = loop._runner.dispatch, [steps]

    def dispatch(prepared):
        left[0] -= 1
        if left[0] < 0:
            assert when is None or when.wait(30)
            raise ZeroDivisionError("injected")
        return real(prepared)

    loop._runner.dispatch = dispatch
    return loop


def failed(info):
    return [part["status"] == "failed" for part in info["replicas"]]


@pytest.mark.parametrize("steps", long_but([0, 1, 2, 5, 17, 40], 0, 17))
def test_its_requests_go_on_elsewhere(engine, expected, steps):
    before = engine.get_server_info()["generated_tokens"]
    loop = break_down(engine, 1, steps)
    results = engine.generate(**WHOLE)
    loop._thread.join(30)
    assert ids(results) == ids(expected["whole"])
    for mine, other in zip(results, expected["whole"], strict=True):
        meta = mine["meta_info"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"] == 60
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
        assert logprobs(mine) == pytest.approx(logprobs(other), abs=1e-3)
    info = engine.get_server_info()
    assert failed(info) == [False, True] and "injected" in info["replicas"][1]["error"]
    assert info["replicas"][0]["error"] is None and len(info["internal_states"]) == 2
    assert info["generated_tokens"] - before >= 60 * len(results)
    assert info["finished_requests"]["length"] == len(results)
    assert info["num_running"] == info["num_waiting"] == info["num_used_pages"] == 0
    assert set(ranks(engine.generate(**CALL))) == {0}


@pytest.mark.long
def test_on_another_row_of_parts(folder, expected):
    """Each replica is cut over two devices."""
    options = {**OPTIONS, "dp_size": 2, "tp_size": 2, "log_level": "critical"}
    with jaxserve.Engine(folder, **options) as engine:
        loop = break_down(engine, 1, 9)
        results = engine.generate(**WHOLE)
        loop._thread.join(30)
        info = engine.get_server_info()
    assert ids(results) == ids(expected["whole"])
    assert failed(info) == [False, True] and info["late_compiles"] == 0
    assert [len(part["devices"]) for part in info["replicas"]] == [2, 2]


def streamed(engine, params, begun, prompts=PROMPTS[:6]):
    """The chunks of a stream each; `begun` is set when each has one."""
    streams = [
        engine.generate(input_ids=prompt, sampling_params=params, stream=True) for prompt in prompts
    ]
    chunks = [[next(stream)] for stream in streams]
    begun.set()
    for stream, seen in zip(streams, chunks, strict=True):
        seen += stream
    return chunks


def test_a_stream_goes_on_from_the_tokens_it_has(engine, expected):
    begun = threading.Event()
    loop = break_down(engine, 0, 20, begun)
    chunks = streamed(engine, STREAMED, begun)
    loop._thread.join(30)
    assert failed(engine.get_server_info()) == [True, False]
    for number, seen in enumerate(chunks):
        lengths = [len(chunk["output_ids"]) for chunk in seen]
        assert lengths == sorted(set(lengths)), "no token twice"
        assert seen[-1]["output_ids"] == expected["streamed"][number]["output_ids"]
        assert seen[-1]["meta_info"]["dp_rank"] == 1
    assert {seen[0]["meta_info"]["dp_rank"] for seen in chunks} == {0, 1}


def test_what_is_pinned_to_it(engine, expected):
    loop = break_down(engine, 1, 4)
    results = engine.generate(**CALL, routed_dp_rank=1)
    loop._thread.join(30)
    assert ids(results) == ids(expected["whole"]) and set(ranks(results)) == {0}
    with pytest.raises(EngineDeadError, match="replica 1 has failed: ZeroDivisionError") as caught:
        engine.generate(**CALL, routed_dp_rank=1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert set(ranks(engine.generate(**CALL, routed_dp_rank=0))) == {0}


def test_when_the_last_one_fails_all_get_the_error(engine):
    errors = []

    def call():
        try:
            engine.generate(**CALL)
        except EngineDeadError as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(6)]
    loops = [break_down(engine, rank, 2 + 5 * rank) for rank in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(errors) == len(callers)
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in errors)
    for loop in loops:
        loop._thread.join(30)
    for late in (engine.get_server_info, engine.flush_cache, lambda: engine.generate(**CALL)):
        with pytest.raises(EngineDeadError):
            late()
    engine.abort_request(abort_all=True)
    assert b"jaxserve_up" in scrape(engine) and b'tiny"} 1.0' not in scrape(engine)


def scrape(engine):
    from prometheus_client import generate_latest

    return generate_latest(engine.metrics)


def test_an_abort_between_failing_and_going_on(engine):
    """Told to a loop that has stopped, before its requests are queued elsewhere."""
    loops = inside.replicas(engine)
    owner = loops[1]._owner
    real, reached, told = owner.stopped, threading.Event(), threading.Event()

    def stopped(left):
        reached.set()
        assert told.wait(30)
        real(left)

    owner.stopped = stopped
    endless = {**GREEDY, "max_new_tokens": 400}
    streams = [
        engine.generate(
            input_ids=text(7, 9), sampling_params=endless, rid=name, stream=True, routed_dp_rank=1
        )
        for name in ("one", "two", "three")
    ]
    for stream in streams:
        next(stream)
    break_down(engine, 1, 1)
    assert reached.wait(30)
    engine.abort_request("two")
    streams[0].close()
    told.set()
    loops[1]._thread.join(30)
    ended = list(streams[1])[-1]["meta_info"]
    assert ended["finish_reason"]["type"] == "abort" and ended["completion_tokens"] < 400
    assert list(streams[2])[-1]["meta_info"]["completion_tokens"] == 400
    assert engine.get_server_info()["finished_requests"] == {
        "stop": 0, "length": 1, "abort": 2, "error": 0,
    }  # fmt: skip


def test_calls_while_replicas_fail_one_by_one(folder):
    """From many threads: each call has its own result, whoever fails meanwhile."""
    with jaxserve.Engine(folder, dp_size=4, log_level="critical", **OPTIONS) as engine:
        wanted = [engine.generate(input_ids=p, sampling_params=SEEDED) for p in PROMPTS]
        failures, stop = [], time.monotonic() + 60

        def call(number):
            for round_ in range(6):
                index = (number + round_) % len(PROMPTS)
                result = engine.generate(input_ids=PROMPTS[index], sampling_params=SEEDED)
                if result["output_ids"] != wanted[index]["output_ids"]:
                    failures.append((number, round_))

        callers = [threading.Thread(target=call, args=(n,)) for n in range(8)]
        for caller in callers:
            caller.start()
        for rank in (2, 0, 3):
            break_down(engine, rank, 3)
            while engine.get_server_info()["replicas"][rank]["status"] == "ready":
                assert time.monotonic() < stop
                engine.generate(input_ids=PROMPTS[0], sampling_params=SEEDED)
                load = inside.replicas(engine)[rank]
                if load._thread.is_alive():
                    with contextlib.suppress(EngineDeadError):  # it may fail before or with this
                        engine.generate(
                            input_ids=PROMPTS[0], sampling_params=SEEDED, routed_dp_rank=rank
                        )
        for caller in callers:
            caller.join(60)
        assert not failures and failed(engine.get_server_info()) == [True, False, True, True]


def test_a_request_that_fails_is_no_replica_that_fails(engine, monkeypatch):
    def prepare(batch):
        raise ZeroDivisionError("injected")

    runner = inside.replicas(engine)[1]._runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "prepare", prepare)
        with pytest.raises(RequestFailedError, match="injected"):
            engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, routed_dp_rank=1)
    result = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, routed_dp_rank=1)
    assert len(result["output_ids"]) == GREEDY["max_new_tokens"]
    assert failed(engine.get_server_info()) == [False, False]
