"""The mailbox between the engine thread and a call."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from jaxserve.inbox import Inbox, Task
from jaxserve.mailbox import Mailbox

NUMBERS: Any = range(1000)


def test_updates_come_in_order_and_all_at_once():
    box = Mailbox()
    for number in NUMBERS:
        box.put(number)
    assert box.get() == list(NUMBERS)
    assert box.get(timeout=0) == box.get(timeout=0.01) == []


def test_a_reader_waits_for_the_first_update():
    box = Mailbox()
    threading.Timer(0.05, lambda: box.put(NUMBERS[7])).start()
    started = time.perf_counter()
    assert box.get(timeout=10) == [7]
    assert 0.03 < time.perf_counter() - started < 5


def writer(box, count=1000):
    thread = threading.Thread(target=lambda: [box.put(number) for number in range(count)])
    thread.start()
    return thread


def test_nothing_is_lost_between_threads():
    box, got = Mailbox(), []
    thread = writer(box)
    while len(got) < 1000:
        got += box.get()
    thread.join()
    assert got == list(NUMBERS)


def test_nothing_is_lost_in_a_coroutine_that_is_cancelled_again_and_again():
    box, got = Mailbox(), []

    async def main():
        thread = writer(box)
        while len(got) < 1000:
            task = asyncio.create_task(box.aget())
            await asyncio.sleep(0)
            if task.done():
                got.extend(task.result())
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        thread.join()

    asyncio.run(main())
    assert got == list(NUMBERS)


def test_a_coroutine_waits_without_blocking_its_loop():
    box = Mailbox()

    async def main():
        reader = asyncio.create_task(box.aget())
        await asyncio.sleep(0.01)
        assert not reader.done()
        threading.Timer(0.01, lambda: box.put(NUMBERS[3])).start()
        return await asyncio.wait_for(reader, 10)

    assert asyncio.run(main()) == [3]


def test_a_closed_loop_does_not_matter():
    box = Mailbox()
    loop = asyncio.new_event_loop()
    reader = loop.create_task(box.aget())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    box.put(NUMBERS[1])
    assert box.get() == [1]
    reader._log_destroy_pending = False  # pyright: ignore
    reader.get_coro().close()  # pyright: ignore


def test_the_engine_can_read_while_a_caller_that_wakes_it_is_interrupted():
    """By a signal handler, say, that waits for the engine."""
    inbox, taken = Inbox(), []

    class Interrupted:
        def set(self):
            reader = threading.Thread(target=lambda: taken.append(inbox.take(False)), daemon=True)
            reader.start()
            reader.join(5)

    inbox._signal = Interrupted()  # type: ignore[assignment]
    task = Task(lambda: None, lambda error: None)
    inbox.put(task)
    assert taken == [[task]]
