"""What goes wrong around a running engine: early closes, aborts, failures, threads, shutdown."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time

import psutil
import pytest

import jaxserve
from jaxserve.errors import EngineDeadError, EngineShutdownError
from tests import inside
from tests.faults import fail_at

pytestmark = pytest.mark.usefixtures("kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 256, "max_running_requests": 8,
    "cuda_graph_bs": [1, 8], "chunked_prefill_size": 128, "max_total_tokens": 1024,
}  # fmt: skip
LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
SHORT = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        yield engine


def free_tokens(engine):
    info = engine.get_server_info()
    return info["available_tokens"], info["max_total_num_tokens"]


def assert_works(engine):
    assert len(engine.generate(input_ids=PROMPT, sampling_params=SHORT)["output_ids"]) == 8
    free, total = free_tokens(engine)
    assert free == total


def in_thread(function):
    """Run `function` in a thread; returns the thread and a list that gets its result or error."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_closing_a_stream_gives_its_pages_back_before_the_next_step(engine):
    stream = engine.generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
    next(stream)
    free, total = free_tokens(engine)
    assert free < total
    stream.close()
    free, total = free_tokens(engine)
    assert free == total
    assert_works(engine)


def test_cancelling_a_task_or_closing_an_async_stream_aborts(engine):
    async def main():
        task = asyncio.create_task(engine.async_generate(input_ids=PROMPT, sampling_params=LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = await engine.async_generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(main())
    free, total = free_tokens(engine)
    assert free == total
    assert_works(engine)


def test_abort_by_id_returns_what_there_is(engine):
    thread, outcome = in_thread(
        lambda: engine.generate(input_ids=PROMPT, sampling_params=LONG, rid="mine")
    )
    while engine.get_server_info()["num_running"] == 0:
        time.sleep(0.005)
    engine.abort_request("mine")
    thread.join()
    [result] = outcome
    reason = result["meta_info"]["finish_reason"]
    assert (reason["type"], reason["message"]) == ("abort", "Aborted")
    assert len(result["output_ids"]) < 200
    engine.abort_request("nobody")
    assert_works(engine)


def test_shutdown_fails_waiting_calls_and_later_ones(tiny_models):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS)
    many = [PROMPT] * 64
    thread, outcome = in_thread(lambda: engine.generate(input_ids=many, sampling_params=LONG))
    time.sleep(0.1)
    engine.shutdown()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert isinstance(outcome[0], EngineShutdownError)
    with pytest.raises(EngineShutdownError):
        engine.generate(input_ids=PROMPT)
    engine.shutdown()


def test_a_failing_batch_fails_alone(engine, monkeypatch):
    """The host fails before anything is dispatched."""
    runner = inside.runner(engine)
    real = runner.prepare

    def prepare(batch):
        if any(s.request.rid == "poison" for s in batch.sequences):
            raise RuntimeError("injected")
        return real(batch)

    monkeypatch.setattr(runner, "prepare", prepare)
    with pytest.raises(RuntimeError, match="injected"):
        engine.generate(input_ids=PROMPT, sampling_params=SHORT, rid="poison")
    assert_works(engine)


def test_one_failure_on_the_device_is_recomputed(engine, monkeypatch):
    expected = engine.generate(input_ids=[PROMPT] * 3, sampling_params=LONG)
    fail_at(monkeypatch, inside.runner(engine), "dispatch", 19, RuntimeError)
    results = engine.generate(input_ids=[PROMPT] * 3, sampling_params=LONG)
    assert [r["output_ids"] for r in results] == [r["output_ids"] for r in expected]
    assert all(r["meta_info"]["num_retractions"] == 1 for r in results)
    assert_works(engine)


def test_a_dead_engine_fails_every_waiting_call_with_its_cause(tiny_models, monkeypatch):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS)
    waiting = [
        in_thread(lambda: engine.generate(input_ids=PROMPT, sampling_params=LONG)) for _ in range(8)
    ]
    while engine.get_server_info()["num_running"] < 8:
        time.sleep(0.005)

    def broken():
        raise ZeroDivisionError("injected in the engine thread")

    monkeypatch.setattr(inside.scheduler(engine), "schedule", broken)
    for thread, outcome in waiting:
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert isinstance(outcome[0], EngineDeadError)
        assert isinstance(outcome[0].__cause__, ZeroDivisionError)
    with pytest.raises(EngineDeadError, match="injected in the engine thread"):
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)
    engine.shutdown()


def test_two_engines_in_one_process(tiny_models, engine):
    expected = engine.generate(input_ids=PROMPT, sampling_params=SHORT)["output_ids"]
    with jaxserve.Engine(model_path=tiny_models("qwen2"), **OPTIONS) as other:
        assert_works(other)
    assert engine.generate(input_ids=PROMPT, sampling_params=SHORT)["output_ids"] == expected


def test_calls_from_32_threads(engine):
    prompts = [[i + 4, i + 5] for i in range(32)]
    expected = [r["output_ids"] for r in engine.generate(input_ids=prompts, sampling_params=SHORT)]
    calls = [
        in_thread(lambda p=p: engine.generate(input_ids=p, sampling_params=SHORT)["output_ids"])
        for p in prompts
    ]
    for (thread, outcome), tokens in zip(calls, expected, strict=True):
        thread.join(timeout=120)
        assert outcome == [tokens]
    assert_works(engine)


def test_a_sync_call_inside_a_running_event_loop(engine):
    async def main():
        first = engine.generate(input_ids=PROMPT, sampling_params=SHORT)
        second = await engine.async_generate(input_ids=PROMPT, sampling_params=SHORT)
        return first, second

    first, second = asyncio.run(main())
    assert first["output_ids"] == second["output_ids"]


@pytest.mark.long
def test_soak_leaves_no_page_and_no_memory_behind(tiny_models):
    """500 random requests with random aborts, on a pool that is too small for them."""
    options = {**OPTIONS, "max_total_tokens": 768, "max_running_requests": 8}
    random_ = random.Random(0)
    process = psutil.Process()
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:

        async def one(number):
            prompt = [random_.randrange(4, 500) for _ in range(random_.randint(1, 120))]
            params = {
                "max_new_tokens": random_.randint(0, 60),
                "temperature": random_.choice([0, 0.8]),
                "top_p": random_.choice([1.0, 0.9]),
                "n": random_.choice([1, 1, 1, 2]),
                "frequency_penalty": random_.choice([0, 0.3]),
                "logit_bias": random_.choice([None, {"9": 2.0}]),
            }
            logprobs = random_.random() < 0.1
            fate = random_.random()
            await asyncio.sleep(random_.random() * 0.2)
            if fate < 0.2:
                stream = await engine.async_generate(
                    input_ids=prompt, sampling_params=params, stream=True
                )
                left = random_.randint(0, 3)
                async for _ in stream:
                    if left == 0:
                        break
                    left -= 1
                await stream.aclose()
                return
            call = engine.async_generate(
                input_ids=prompt, sampling_params=params, return_logprob=logprobs,
                logprob_start_len=0 if logprobs else -1, rid=f"soak-{number}",
            )  # fmt: skip
            if fate < 0.35:
                task = asyncio.create_task(call)
                await asyncio.sleep(random_.random() * 0.05)
                engine.abort_request(f"soak-{number}")
                await task
                return
            results = await call
            for result in results if isinstance(results, list) else [results]:
                assert len(result["output_ids"]) <= params["max_new_tokens"]

        async def wave(count):
            await asyncio.gather(*(one(random_.random()) for _ in range(count)))

        asyncio.run(wave(100))
        gc.collect()
        before = process.memory_info().rss
        asyncio.run(wave(400))
        gc.collect()
        grown = process.memory_info().rss - before
        info = engine.get_server_info()
        assert info["available_tokens"] == info["max_total_num_tokens"]
        assert info["num_running"] == info["num_waiting"] == 0
        assert grown < 48 << 20, f"{grown / 2**20:.0f} MiB"
        assert_works(engine)
