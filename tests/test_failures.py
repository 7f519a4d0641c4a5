"""What each failure inside the engine costs (docs/architecture.md): never more than that."""

from __future__ import annotations

import itertools
import threading

import pytest

import jaxserve
from jaxserve.errors import (
    EngineDeadError,
    InvalidRequestError,
    OutOfPagesError,
    RequestFailedError,
)
from jaxserve.inbox import Task
from jaxserve.packing.batch import ExtendBatch
from tests import inside
from tests.faults import fail_at
from tests.marks import long
from tests.prompts import ids
from tests.test_engine_hardening import LONG, PROMPT, SHORT, assert_works, in_thread

pytestmark = pytest.mark.usefixtures("kept_programs")
OPTIONS = {
    "context_length": 256, "max_running_requests": 8, "chunked_prefill_size": 128,
    "cuda_graph_bs": [1, 8], "max_total_tokens": 1024, "log_level": "critical",
}  # fmt: skip
CHUNKED = [5 + i % 300 for i in range(200)]
MANY = {"input_ids": [PROMPT, CHUNKED], "sampling_params": {**LONG, "max_new_tokens": 50, "n": 3}}


@pytest.fixture
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        yield engine


class FailingArray:
    """A step's result that the device could not compute."""

    def __array__(self, *args, **options):
        raise RuntimeError("injected on the device")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (error, number) if (error is MemoryError) == (number in (1, 7)) else long(error, number)
        for error in (OutOfPagesError, MemoryError)
        for number in (0, 1, 2, 3, 7, 12)
    ],
)
def test_an_allocation_that_fails_is_recomputed(engine, monkeypatch, number, error):
    """Of a first prompt, of samples that share it, and of running sequences that grow."""
    expected = ids(engine.generate(**MANY))
    pages = inside.scheduler(engine).pages
    calls = fail_at(monkeypatch, pages, "allocate", number, error)
    assert ids(engine.generate(**MANY)) == expected
    assert len(calls) > number
    assert_works(engine)
    assert inside.scheduler(engine).slots.available == OPTIONS["max_running_requests"]


def test_a_program_that_raises_with_its_arguments_donated_is_recomputed(engine, monkeypatch):
    expected = ids(engine.generate(**MANY))
    runner = inside.runner(engine)
    programs, calls = runner.programs, []

    class Programs:
        def program(self, key):
            real = programs.program(key)

            def run(*args):
                made = real(*args)
                calls.append(key)
                if len(calls) == 20:
                    raise RuntimeError("injected")
                return made

            return run

        def __getattr__(self, name):
            return getattr(programs, name)

    monkeypatch.setattr(runner, "programs", Programs())
    results = engine.generate(**MANY)
    assert ids(results) == expected
    assert all(r["meta_info"]["num_retractions"] == 1 for r in results)


@pytest.mark.parametrize("broken", ["tokens", "payloads", "prompt_payloads"])
def test_any_array_of_a_step_may_fail(engine, monkeypatch, broken):
    wanted = {**MANY, "return_logprob": True, "logprob_start_len": 0}
    expected = engine.generate(**wanted)
    runner, failed = inside.runner(engine), []
    real = runner.dispatch

    def dispatch(prepared):
        result = real(prepared)
        (part,), array = result.parts, FailingArray()
        if broken == "prompt_payloads" and not result.prompt_payloads:
            return result
        if not failed:
            failed.append(result)
            if broken == "prompt_payloads":
                return result._replace(prompt_payloads={"logprobs": array})
            value = array if broken == "tokens" else {"logprobs": array}
            return result._replace(parts=(part._replace(**{broken: value}),))
        return result

    monkeypatch.setattr(runner, "dispatch", dispatch)
    results = engine.generate(**wanted)
    assert ids(results) == ids(expected) and failed
    for result, other in zip(results, expected, strict=True):
        for name in ("input_token_logprobs", "output_token_logprobs"):
            ours, theirs = result["meta_info"][name], other["meta_info"][name]
            assert [t[1] for t in ours] == [t[1] for t in theirs]
            assert [t[0] for t in ours[1:]] == pytest.approx([t[0] for t in theirs[1:]], abs=1e-4)


def test_a_commit_that_fails_half_way_is_recomputed(engine, monkeypatch):
    expected = ids(engine.generate(**MANY))
    slots = inside.scheduler(engine).slots
    calls = fail_at(monkeypatch, slots, "append", 5, MemoryError)
    assert ids(engine.generate(**MANY)) == expected
    assert len(calls) > 5
    assert_works(engine)


def test_failures_are_not_in_a_row_when_the_engine_was_idle_between(engine, monkeypatch):
    """Nobody reads a token between them, because the requests are aborted; yet they are no sign
    that the engine cannot go on."""
    real, failures = inside.runner(engine).dispatch, itertools.count(1)

    def dispatch(prepared):
        if next(failures) <= 3:
            engine.abort_request(abort_all=True)
            raise RuntimeError("injected on the device")
        return real(prepared)

    monkeypatch.setattr(inside.runner(engine), "dispatch", dispatch)
    for _ in range(3):
        result = engine.generate(input_ids=PROMPT, sampling_params=SHORT)
        assert result["meta_info"]["finish_reason"]["type"] == "abort"
    assert_works(engine)


@pytest.mark.timeout(60)
def test_a_prompt_that_always_fails_at_its_second_part_does_not_run_for_ever(engine, monkeypatch):
    runner = inside.runner(engine)
    real = runner.dispatch

    def dispatch(prepared):
        result = real(prepared)
        batch = prepared.batch
        if isinstance(batch, ExtendBatch) and any(row.start for row in batch.rows):
            (part,) = result.parts
            return result._replace(parts=(part._replace(tokens=FailingArray()),))
        return result

    monkeypatch.setattr(runner, "dispatch", dispatch)
    with pytest.raises(EngineDeadError, match="injected on the device"):
        engine.generate(input_ids=CHUNKED, sampling_params=SHORT)


def test_stops_that_cannot_be_checked_fail_their_request_alone(engine, monkeypatch):
    expected = engine.generate(input_ids=PROMPT, sampling_params=LONG)["output_ids"]
    backend = engine._codec._backend
    real, thread = backend.decode, inside.thread(engine)

    def decode(*args, **kwargs):
        if threading.current_thread() is thread:
            raise ZeroDivisionError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(backend, "decode", decode)
    beside, outcome = in_thread(lambda: engine.generate(input_ids=PROMPT, sampling_params=LONG))
    for params in ({**LONG, "stop": "never"}, {**LONG, "stop_regex": "never"}):
        with pytest.raises(RequestFailedError, match="ZeroDivisionError: injected") as caught:
            engine.generate(input_ids=PROMPT, sampling_params=params)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    beside.join(timeout=60)
    assert outcome[0]["output_ids"] == expected
    assert engine.get_server_info()["finished_requests"]["error"] == 2
    assert_works(engine)


@pytest.mark.parametrize("where", ["encode", "decode"])
def test_a_tokenizer_that_fails_in_a_call_fails_that_call(engine, monkeypatch, where):
    number = 0 if where == "encode" else 1
    fail_at(monkeypatch, engine._codec._backend, where, number, ZeroDivisionError)
    with pytest.raises(RequestFailedError, match=f"{where}: ZeroDivisionError: injected"):
        list(engine.generate(["hello", "world"], LONG, stream=True))
    monkeypatch.undo()
    assert_works(engine)


def test_callers_of_one_failed_batch_get_an_exception_each(engine, monkeypatch):
    """A shared one would be raised by several threads at a time, and grow with each."""
    real, runner = inside.runner(engine).prepare, inside.runner(engine)
    monkeypatch.setattr(
        runner, "prepare", lambda batch: real(batch) if len(batch.sequences) < 4 else 1 / 0
    )
    calls = [
        in_thread(lambda: engine.generate(input_ids=PROMPT, sampling_params={**LONG, "n": 2}))
        for _ in range(4)
    ]
    for thread, _ in calls:
        thread.join(timeout=60)
    errors = [outcome[0] for _, outcome in calls if isinstance(outcome[0], Exception)]
    assert len(errors) > 1 and len({id(error) for error in errors}) == len(errors)
    assert all(type(error) is RequestFailedError for error in errors)
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in errors)
    assert_works(engine)


def test_a_failing_task_costs_its_caller_and_not_those_behind_it(engine):
    """They are taken from the inbox together."""
    inbox, go, cancelled = inside.inbox(engine), threading.Event(), []
    inbox.put(Task(lambda: go.wait(60) and None, cancelled.append))
    inbox.put(Task(lambda: 1 / 0, cancelled.append))
    behind, outcome = in_thread(engine.flush_cache)
    go.set()
    behind.join(timeout=60)
    assert outcome[0].success
    [error] = cancelled
    assert isinstance(error, RequestFailedError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert_works(engine)


@pytest.mark.parametrize("arguments", [(5,), (["a"],), ("a", "yes")])
def test_a_bad_abort_is_the_callers_error(engine, arguments):
    for method in (engine.abort_request, engine.tokenizer_manager.abort_request):
        with pytest.raises(InvalidRequestError, match="must be"):
            method(*arguments)
    engine.abort_request(None)
    assert_works(engine)


@pytest.mark.timeout(60)
def test_everybody_hears_of_the_end_though_the_scheduler_is_broken(tiny_models, monkeypatch):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS)
    waiting = [
        in_thread(lambda: engine.generate(input_ids=PROMPT, sampling_params=LONG)) for _ in range(4)
    ]
    scheduler = inside.scheduler(engine)
    for name in ("schedule", "finish", "retract_all"):
        monkeypatch.setattr(scheduler, name, lambda *_: 1 / 0)
    for thread, outcome in waiting:
        thread.join(timeout=30)
        assert isinstance(outcome[0], EngineDeadError)
        assert isinstance(outcome[0].__cause__, ZeroDivisionError)
    engine.shutdown()


def test_shutdown_leaves_no_thread(tiny_models):
    before = set(threading.enumerate())
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        for shown in (False, True):
            engine.generate("hello", SHORT, progress=shown)
    assert set(threading.enumerate()) <= before
