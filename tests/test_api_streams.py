"""Streams, cancellation, threads and event loops, on a fake engine loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Generator

import pytest

from jaxserve.errors import EngineShutdownError
from jaxserve.utils import async_stream_and_merge, stream_and_merge
from tests.api_fakes import Fakes, byte_level_tokenizer, loop_of, text_script

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.eos_token_id
STORY = "ha ha ha日本語 𓂀 haha END of story"
STORY_IDS = TOKENIZER(STORY)["input_ids"]
LONG = {"max_new_tokens": 500}


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes(TOKENIZER, monkeypatch)
    yield fakes
    fakes.close()


@pytest.fixture(params=["cumulative", "deltas"])
def story(request, fakes):
    """Engines with both ways of streaming, slow enough for single tokens to be seen."""
    deltas = request.param == "deltas"
    return fakes.engine(text_script(TOKENIZER, STORY), pause=0.001, stream_output=deltas)


@pytest.fixture
def endless(fakes):
    return fakes.engine(lambda request, step: 40, pause=0.001, context_length=2000)


def merged(engine, chunks):
    """Text and ids of a stream, checking that each chunk is what its kind promises."""
    text, ids = "", []
    for chunk in chunks:
        if engine.server_args.stream_output:
            text, ids = text + chunk["text"], ids + chunk["output_ids"]
        else:
            assert chunk["text"].startswith(text) and chunk["output_ids"][: len(ids)] == ids
            text, ids = chunk["text"], chunk["output_ids"]
        assert chunk["meta_info"]["completion_tokens"] == len(ids)
        assert TOKENIZER.decode(ids, skip_special_tokens=True).startswith(text)
    return text, ids


def idle(engine, seconds=5.0):
    """Waits until nothing runs in the engine."""
    end = time.monotonic() + seconds
    while loop_of(engine).live and time.monotonic() < end:
        time.sleep(0.001)
    return not loop_of(engine).live


def test_a_stream_of_one_prompt(story):
    stream = story.generate("x", stream=True)
    assert isinstance(stream, Generator)
    chunks = list(stream)
    assert len(chunks) > 3
    assert merged(story, chunks) == (STORY, [*STORY_IDS, EOS])
    reasons = [chunk["meta_info"]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    assert reasons[-1] == {"type": "stop", "matched": EOS}
    assert ["e2e_latency" in chunk["meta_info"] for chunk in chunks] == [
        reason is not None for reason in reasons
    ]
    assert not any("index" in chunk for chunk in chunks)
    assert next(stream, "end") == "end"


def test_an_async_stream(story):
    async def main():
        stream = await story.async_generate("x", stream=True)
        assert isinstance(stream, AsyncGenerator)
        return [chunk async for chunk in stream]

    chunks = asyncio.run(main())
    assert merged(story, chunks) == (STORY, [*STORY_IDS, EOS])


@pytest.mark.parametrize(
    ("prompts", "n", "indices"),
    [(["x"], 1, {0}), (["x", "y"], 1, {0, 1}), ("x", 2, {0, 1}), (["x", "y"], 2, {0, 1, 2, 3})],
)
def test_streams_of_several_requests_carry_an_index(story, prompts, n, indices):
    chunks = list(story.generate(prompts, {"n": n}, stream=True))
    assert {chunk["index"] for chunk in chunks} == indices
    for index in indices:
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert merged(story, own) == (STORY, [*STORY_IDS, EOS])


@pytest.mark.parametrize("params", [{"stop": "END"}, {"stop_regex": "E[M-O]D"}])
@pytest.mark.parametrize("keep", [False, True])
def test_no_part_of_a_stop_is_ever_shown(story, params, keep):
    chunks = list(story.generate("x", {**params, "no_stop_trim": keep}, stream=True))
    text, _ = merged(story, chunks)
    assert text == STORY[: STORY.index("END") + (3 if keep else 0)]
    before = "".join(chunk["text"] for chunk in chunks[:-1])
    assert "E" not in before


def test_chunks_are_separate_objects(story):
    chunks = list(story.generate("x", stream=True, return_logprob=True))
    copies = [
        (list(chunk["output_ids"]), list(chunk["meta_info"]["output_token_logprobs"]))
        for chunk in chunks
    ]
    for chunk in chunks:
        chunk["output_ids"].append(-1)
        chunk["meta_info"]["output_token_logprobs"].append(None)
    assert [
        (chunk["output_ids"][:-1], chunk["meta_info"]["output_token_logprobs"][:-1])
        for chunk in chunks
    ] == copies


def test_logprobs_follow_the_tokens(story):
    chunks = list(story.generate("x", stream=True, return_logprob=True, top_logprobs_num=1))
    for chunk in chunks:
        meta = chunk["meta_info"]
        assert [token for _, token, _ in meta["output_token_logprobs"]] == chunk["output_ids"]
        assert meta["output_token_logprobs_length"] == len(chunk["output_ids"])
        assert len(meta["output_top_logprobs"]) == len(chunk["output_ids"])


def test_pieces_that_pile_up_are_one_chunk(story):
    stream = story.generate("x", stream=True)
    assert idle(story)
    (chunk,) = stream
    assert (chunk["text"], chunk["output_ids"]) == (STORY, [*STORY_IDS, EOS])


def test_the_stream_interval(fakes):
    engine = fakes.engine(lambda request, step: 40, pause=0.005, stream_interval=3)
    chunks = list(engine.generate("x", {"max_new_tokens": 8}, stream=True))
    assert [len(chunk["output_ids"]) for chunk in chunks] == [1, 4, 7, 8]
    chunks = list(engine.generate("x", {"max_new_tokens": 8, "stream_interval": 5}, stream=True))
    assert [len(chunk["output_ids"]) for chunk in chunks] == [1, 6, 8]


def test_merging_helpers(story):
    assert stream_and_merge(story, "x", {"temperature": 0.2}) == STORY

    async def main():
        return [piece async for piece in async_stream_and_merge(story, "x", {})]

    pieces = asyncio.run(main())
    assert len(pieces) > 3 and all(pieces) and "".join(pieces) == STORY


def test_stream_errors_surface_at_the_call(story):
    with pytest.raises(ValueError, match="top_p"):
        story.generate("x", {"top_p": 0}, stream=True)

    async def main():
        with pytest.raises(ValueError, match="top_p"):
            await story.async_generate("x", {"top_p": 0}, stream=True)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "drop", "throw", "break", "unstarted"])
def test_leaving_a_stream_aborts_its_requests(endless, how):
    stream = endless.generate(["x", "y"], LONG, stream=True)
    if how == "break":
        for _ in stream:
            break
    elif how != "unstarted":
        next(stream)
    if how == "throw":
        with pytest.raises(KeyError):
            stream.throw(KeyError("left"))
    elif how == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    del stream
    gc.collect()
    assert len(loop_of(endless).aborted) == 2 and idle(endless)


@pytest.mark.parametrize("how", ["aclose", "break", "cancel", "throw"])
def test_leaving_an_async_stream_aborts_its_requests(endless, how):
    async def consume():
        stream = await endless.async_generate(["x", "y"], LONG, stream=True)
        await anext(stream)
        if how == "aclose":
            await stream.aclose()
        elif how == "throw":
            with pytest.raises(KeyError):
                await stream.athrow(KeyError("left"))
        elif how == "break":
            async for _ in stream:
                break
        else:
            async for _ in stream:
                pass

    async def main():
        task = asyncio.create_task(consume())
        if how == "cancel":
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task

    asyncio.run(main())
    gc.collect()
    assert len(loop_of(endless).aborted) == 2 and idle(endless)


def test_cancelling_a_task_aborts_its_requests(endless):
    async def main():
        task = asyncio.create_task(endless.async_generate(["x", "y"], LONG))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(task, 0.05)

    asyncio.run(main())
    assert len(loop_of(endless).aborted) == 2 and idle(endless)


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_aborts_the_call_and_is_raised_again(endless, stream):
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        result = endless.generate(["x", "y"], {"max_new_tokens": 1500}, stream=stream)
        for _ in result:
            pass
    timer.join()
    assert len(loop_of(endless).aborted) == 2 and idle(endless)


def test_closing_one_stream_leaves_ids_that_begin_alike_alone(endless):
    one = endless.generate("x", LONG, rid="1", stream=True)
    other = endless.generate("x", {"max_new_tokens": 50}, rid="10", stream=True)
    one.close()
    assert list(other)[-1]["meta_info"]["finish_reason"]["type"] == "length"
    assert loop_of(endless).aborted == ["1"]


def test_ids_in_flight_are_refused_and_free_again_afterwards(endless):
    stream = endless.generate("x", LONG, rid="me", stream=True)
    with pytest.raises(ValueError, match="Duplicate request ID"):
        endless.generate("y", {"max_new_tokens": 2}, rid="me")
    with pytest.raises(ValueError, match="Duplicate request ID"):
        endless.generate(["y", "z"], {"max_new_tokens": 2}, rid=["you", "me"])
    stream.close()
    for _ in range(2):
        result = endless.generate(["y", "z"], {"max_new_tokens": 2}, rid=["you", "me"])
        assert result[1]["meta_info"]["id"] == "me"
    list(endless.generate("y", {"max_new_tokens": 2}, rid="me", stream=True))
    assert endless.generate("y", {"max_new_tokens": 2}, rid="me")["output_ids"]


def test_a_stream_keeps_its_engine(fakes):
    engine = fakes.engine(lambda request, step: 40)
    stream = engine.generate("x", {"max_new_tokens": 20}, stream=True)
    loop = loop_of(engine)
    fakes.engines.clear()
    del engine
    gc.collect()
    assert list(stream)[-1]["meta_info"]["completion_tokens"] == 20
    del stream
    gc.collect()
    assert isinstance(loop.dead, EngineShutdownError)


def test_shutdown_ends_waiting_calls(endless):
    errors = []

    def call():
        try:
            endless.generate("x", {"max_new_tokens": 1500})
        except EngineShutdownError as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(loop_of(endless).live) < 4:
        time.sleep(0.001)
    endless.shutdown()
    for thread in threads:
        thread.join(5)
    assert len(errors) == 4


def test_calls_from_32_threads(fakes):
    engine = fakes.engine()
    params = {"max_new_tokens": 20, "ignore_eos": True}
    failures = []

    def work(number):
        try:
            for turn in range(5):
                words = f"thread {number} turn {turn}"
                ids = TOKENIZER(words)["input_ids"]
                expected = list(itertools.islice(itertools.cycle(ids), 20))
                if turn % 3 == 0:
                    result = engine.generate(words, params)
                elif turn % 3 == 1:
                    result = list(engine.generate(words, params, stream=True))[-1]
                else:
                    result = asyncio.run(engine.async_generate(words, params))
                assert result["output_ids"] == expected
                assert result["text"] == TOKENIZER.decode(expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures and idle(engine)


def test_400_tasks_of_one_loop(fakes):
    engine = fakes.engine(pause=0.001)

    async def main():
        calls = [
            engine.async_generate(input_ids=[5, i % 300], sampling_params={"max_new_tokens": 4})
            for i in range(400)
        ]
        return await asyncio.gather(*calls)

    results = asyncio.run(main())
    assert all(len(result["output_ids"]) >= 1 for result in results)
    assert [result["output_ids"][0] for result in results] == [5] * 400


def test_inside_a_running_event_loop(fakes):
    """As in a notebook: sync calls from a coroutine, and async ones beside them."""
    engine = fakes.engine()
    params = {"max_new_tokens": 3, "ignore_eos": True}

    async def main():
        sync = engine.generate(input_ids=[7], sampling_params=params)
        streamed = list(engine.generate(input_ids=[7], sampling_params=params, stream=True))
        return (
            sync,
            streamed[-1],
            await engine.async_generate(input_ids=[7], sampling_params=params),
        )

    for result in asyncio.run(main()):
        assert result["output_ids"] == [7, 7, 7]


def test_a_call_whose_loop_was_closed_disturbs_nobody(endless):
    async def leave():
        task = asyncio.create_task(endless.async_generate("x", LONG))
        await asyncio.sleep(0.01)
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(leave())
    loop.close()
    assert endless.generate("y", {"max_new_tokens": 5})["output_ids"] == [40] * 5
    endless.abort_request(abort_all=True)
    assert idle(endless)
    # The loop is gone and cannot finish the task; without this asyncio complains.
    task._log_destroy_pending = False
    task.get_coro().close()


def test_async_generate_is_awaited_first(endless):
    coroutine = endless.async_generate("x", {"max_new_tokens": 1})
    assert inspect.iscoroutine(coroutine)
    assert asyncio.run(coroutine)["output_ids"] == [40]
    assert asyncio.run(
        endless.async_chat([{"role": "user", "content": "x"}], {"max_new_tokens": 1})
    )


def test_async_errors_of_the_engine(fakes):
    def script(request, step):
        raise ZeroDivisionError("boom")

    async def main(stream):
        result = await fakes.engine(script).async_generate(["a", "b"], stream=stream)
        async for _ in result:
            pass

    for stream in (False, True):
        with pytest.raises(RuntimeError, match="boom"):
            asyncio.run(main(stream))
