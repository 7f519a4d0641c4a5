"""One call in progress: waits for its requests, streams them, and aborts them when left."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

from jaxserve.api.request_log import RequestLog
from jaxserve.core import Core
from jaxserve.errors import InvalidRequestError
from jaxserve.mailbox import Mailbox
from jaxserve.output.result import Output
from jaxserve.process import Uncopyable
from jaxserve.request import Request, Update


class LiveIds:
    """The ids of the requests in flight. Thread-safe."""

    def __init__(self) -> None:
        # Re-entrant: the collector may drop a stream, and release its ids, at any allocation.
        self._lock = threading.RLock()
        self._holders: dict[str, object] = {}

    def reserve(self, rids: Sequence[str], holder: object) -> None:
        """Raises InvalidRequestError, reserving none, if one of them is in flight."""
        with self._lock:
            for rid in rids:
                if rid in self._holders:
                    raise InvalidRequestError(f"Duplicate request ID: {rid!r} is in flight")
            self._holders.update(dict.fromkeys(rids, holder))

    def release(self, rids: Sequence[str], holder: object) -> None:
        """Those of `rids` that are `holder`'s are free again."""
        with self._lock:
            for rid in rids:
                if self._holders.get(rid) is holder:
                    del self._holders[rid]


class Call(Uncopyable):
    """Submits requests on construction and collects their updates.

    Whoever stops reading before the end must call `close`, which aborts what still runs; the
    methods do so themselves when they are interrupted or cancelled, and a call that is dropped
    too.
    """

    def __init__(
        self,
        core: Core,
        ids: LiveIds,
        outputs: Sequence[Output],
        mailbox: Mailbox,
        owner: object,
        log: RequestLog | None = None,
    ) -> None:
        """owner: kept alive until the call has ended, because an engine that is used only through a
        stream must not be collected. log: is told of each request. InvalidRequestError: an id is in
        flight, or too many requests wait; EngineDeadError, EngineShutdownError."""
        self._core = core
        self._ids = ids
        self._mailbox = mailbox
        self._outputs = {output.request: output for output in outputs}
        self._unfinished: set[Request] = set()
        self._log = log
        self._rids = [request.rid for request in self._outputs]
        self._owner = owner
        try:
            ids.reserve(self._rids, mailbox)
            self._unfinished.update(self._outputs)
            if log is not None:
                for request in self._outputs:
                    log.received(request)
            if self._outputs:
                core.submit(list(self._outputs))
        except BaseException:
            # Nothing was submitted, unless it was Ctrl-C that came in between.
            self.close()
            raise
        self._end_if_finished()

    @property
    def ended(self) -> bool:
        """Whether no further update is to come."""
        return not self._unfinished

    @property
    def size(self) -> int:
        """How many requests the call has."""
        return len(self._outputs)

    def close(self) -> None:
        """Aborts the requests that have not finished. May be called at any time. A forked process
        only forgets them: they are not its own."""
        if self._mailbox.home.left:
            self._unfinished.clear()
            self._owner = None
            return
        left = list(self._unfinished)
        if left:
            # Before anything is forgotten: Ctrl-C may come here too, and `close` again.
            self._core.abort_requests(left)
            self._unfinished.clear()
            if self._log is not None:
                for request in left:
                    self._log.left(request)
        self._end_if_finished()

    def __del__(self) -> None:
        # Ctrl-C may come after the requests are queued and before anybody has this call.
        if getattr(self, "_owner", None) is not None:
            self.close()

    def results(self, finished: Callable[[], object]) -> list[dict[str, Any]]:
        """Waits for all requests; `finished` is called as each one ends."""
        with self._closing_on_error():
            while not self.ended:
                self._take(self._mailbox.get(), finished)
        return [output.result() for output in self._outputs.values()]

    async def aresults(self, finished: Callable[[], object]) -> list[dict[str, Any]]:
        """`results` in a coroutine; cancelling it aborts the requests."""
        with self._closing_on_error():
            while not self.ended:
                self._take(await self._mailbox.aget(), finished)
        return [output.result() for output in self._outputs.values()]

    def chunks(self) -> list[dict[str, Any]]:
        """Waits for news and makes one chunk of each request that has some."""
        with self._closing_on_error():
            return self._chunks(self._mailbox.get())

    async def achunks(self) -> list[dict[str, Any]]:
        """`chunks` in a coroutine."""
        with self._closing_on_error():
            return self._chunks(await self._mailbox.aget())

    def _chunks(self, updates: list[Update]) -> list[dict[str, Any]]:
        touched = self._take(updates, lambda: None)
        return [output.chunk() for output in touched]

    def _take(self, updates: list[Update], finished: Callable[[], object]) -> list[Output]:
        """Hands updates to their outputs; returns these, each once, in order of arrival."""
        touched: dict[Request, Output] = {}
        for update in updates:
            request = update.request
            if update.error is not None:
                self._unfinished.discard(request)
                if self._log is not None:
                    self._log.failed(request, update.error)
                raise update.error
            output = touched[request] = self._outputs[request]
            output.add(update)
            if output.finished:
                self._unfinished.discard(request)
                if self._log is not None:
                    self._log.finished(output)
                finished()
        self._end_if_finished()
        return list(touched.values())

    def _end_if_finished(self) -> None:
        if not self._unfinished and self._owner is not None:
            self._ids.release(self._rids, self._mailbox)
            self._owner = None

    @contextlib.contextmanager
    def _closing_on_error(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


class Stream(Uncopyable, Generator[dict[str, Any], Any, None]):
    """Chunks of a call for `for`. Closing or dropping it aborts the requests."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ready: deque[dict[str, Any]] = deque()

    def send(self, value: Any) -> dict[str, Any]:
        """The next chunk. Raises what went wrong in the engine, StopIteration at the end."""
        while not self._ready:
            if self._call.ended:
                raise StopIteration
            self._ready.extend(self._call.chunks())
        return self._ready.popleft()

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> dict[str, Any]:
        self.close()
        raise typ if val is None else val

    def close(self) -> None:
        self._ready.clear()
        self._call.close()


class AsyncStream(Uncopyable, AsyncGenerator[dict[str, Any], Any]):
    """Chunks of a call for `async for`. Closing, dropping or cancelling aborts the requests."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._ready: deque[dict[str, Any]] = deque()

    async def asend(self, value: Any) -> dict[str, Any]:
        """The next chunk. Raises what went wrong in the engine, StopAsyncIteration at the end."""
        while not self._ready:
            if self._call.ended:
                raise StopAsyncIteration
            self._ready.extend(await self._call.achunks())
        return self._ready.popleft()

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None) -> dict[str, Any]:
        self._stop()
        raise typ if val is None else val

    async def aclose(self) -> None:
        self._stop()

    def _stop(self) -> None:
        self._ready.clear()
        self._call.close()
