"""A call's images, loaded and prepared side by side, with few of them decoded at a time.

Pillow and hashlib release the interpreter's lock where the work is, so threads are enough.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
MOST_THREADS = 16
"""Of a call: for as many images it waits for servers and disks at a time."""


def default_turns() -> int:
    """How many images are decoded at a time by all calls of an engine: each has its pixels twice
    in memory meanwhile. One processor is left to the engine's thread."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) - 1))


class Pool:
    """Threads are a call's own, turns are all calls': who waits for servers holds nobody up."""

    def __init__(self, turns: int) -> None:
        """turns: how many images may be decoded at a time."""
        self.turn = threading.BoundedSemaphore(turns)
        """`with pool.turn:` around what takes memory and a processor. Not on a caller's own thread,
        where Ctrl-C might lose it."""

    def prepare_all(self, prepare: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`prepare` of each item on other threads, in the items' order. The first failure, in time,
        is raised at once, as Ctrl-C is: items that have not begun then never do."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        for index in range(len(items)):
            waiting.put(index)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    index = waiting.get_nowait()
                    try:
                        answers.put((index, prepare(items[index]), None))
                    except BaseException as error:  # it is the caller's, whatever it is
                        answers.put((index, None, error))

        results: dict[int, R] = {}
        try:
            for _ in range(min(MOST_THREADS, len(items))):
                threading.Thread(target=work, name="jaxserve-images", daemon=True).start()
            while len(results) < len(items):
                index, result, error = answers.get()
                if error is not None:
                    raise error
                results[index] = result
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
        return [results[index] for index in range(len(items))]
