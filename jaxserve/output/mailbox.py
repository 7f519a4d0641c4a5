"""Updates on their way from the engine thread to one call."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.request import Update


class Mailbox:
    """A queue with one reader that may be a thread or a coroutine of any event loop.

    Updates stay in the box until `get` or `aget` returns them: a reader that times out or is
    cancelled loses nothing, and `put` never fails because a reader's event loop is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._updates: list[Update] = []
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def put(self, update: Update) -> None:
        """Adds one update and wakes the reader. Never blocks on it."""
        with self._lock:
            self._updates.append(update)
            waiters, self._waiters = self._waiters, []
            self._arrived.notify_all()
        for loop, future in waiters:
            # A closed loop has no reader left; whoever reads next finds the update in the box.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)

    def get(self, timeout: float | None = None) -> list[Update]:
        """Takes all updates, waiting for the first. An empty list after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self._updates:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return []
                self._arrived.wait(left)
            return self._take()

    async def aget(self) -> list[Update]:
        """Takes all updates, waiting for the first without blocking the running event loop."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if self._updates:
                    return self._take()
                future: asyncio.Future[None] = loop.create_future()
                waiter = (loop, future)
                self._waiters.append(waiter)
            try:
                await future
            finally:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)

    def _take(self) -> list[Update]:
        updates, self._updates = self._updates, []
        return updates


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
