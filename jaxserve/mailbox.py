"""Updates on their way from the engine thread to one call."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING

from jaxserve.process import Home
from jaxserve.signals import Signal

if TYPE_CHECKING:
    from jaxserve.request import Update


class Mailbox:
    """A queue with one reader that may be a thread or a coroutine of any event loop.

    Updates stay in the box until `get` or `aget` returns them: a reader that times out or is
    cancelled loses nothing, and `put` never fails because a reader's event loop is closed.
    Reading raises ForkedProcessError in a forked process, into which nobody puts anything.
    """

    def __init__(self) -> None:
        self.home = Home()
        self._lock = threading.Lock()
        self._signal = Signal()
        self._updates: list[Update] = []
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def put(self, update: Update) -> None:
        """Adds one update and wakes the reader. Never blocks on it."""
        with self._lock:
            self._updates.append(update)
            waiters, self._waiters = self._waiters, []
            self._signal.set()
        for loop, future in waiters:
            # A closed loop has no reader left; whoever reads next finds the update in the box.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)

    def get(self, timeout: float | None = None) -> list[Update]:
        """Takes all updates, waiting for the first. An empty list after `timeout` seconds."""
        self.home.check()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:  # no calls: see Inbox.put
                updates, self._updates = self._updates, []
            if updates:
                return updates
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not self._signal.wait(left):
                return []

    async def aget(self) -> list[Update]:
        """Takes all updates, waiting for the first without blocking the running event loop."""
        self.home.check()
        loop = asyncio.get_running_loop()
        while True:
            future: asyncio.Future[None] = loop.create_future()
            waiter = (loop, future)
            with self._lock:
                updates, self._updates = self._updates, []
                if not updates:
                    self._waiters.append(waiter)
            if updates:
                return updates
            try:
                await future
            finally:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
