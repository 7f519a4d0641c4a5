"""What callers do with an engine loop from any thread: they put tasks into its inbox. No jax."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from jaxserve.errors import EngineDeadError
from jaxserve.inbox import Inbox, Task
from jaxserve.leftovers import Choice, Leftovers
from jaxserve.output.commit import ABORTED, fail, finish
from jaxserve.process import Uncopyable
from jaxserve.request import Request, Update
from jaxserve.scheduler.queue_limit import QueueLimit
from jaxserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Reception(Uncopyable):
    """Where requests come in and are ended, until the inbox is closed: what is then left unheard is
    in `_left`. The tasks run on the engine thread."""

    def __init__(self, scheduler: Scheduler, queue_limit: QueueLimit) -> None:
        self._scheduler = scheduler
        self._queue_limit = queue_limit
        self._inbox = Inbox()
        self._left = Leftovers()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none. EngineDeadError, EngineShutdownError: the engine is gone.
        InvalidRequestError: max_queued_requests would be exceeded. (With priorities the worst of
        the queue fail with it instead, when their turn to be queued comes.)"""
        self.check_room(len(requests))
        now = time.perf_counter()
        for request in requests:
            request.submitted_time = now
        self.queue(requests)

    def check_room(self, count: int) -> None:
        """InvalidRequestError: `count` more requests would exceed max_queued_requests."""
        self._queue_limit.check(len(self._scheduler.waiting), count)

    def queue(self, requests: Sequence[Request]) -> None:
        """`submit` for requests that have been let in, and may have outputs already."""

        def run() -> None:
            for request in requests:
                self._scheduler.add(request)
            for request, error in self._queue_limit.shed(self._scheduler.waiting):
                fail(request, error, self._scheduler)

        def cancel(error: BaseException) -> None:
            if isinstance(error, EngineDeadError):
                self._left.requests += requests
                return
            for request in requests:
                request.mailbox.put(Update(request, error=error))

        self._inbox.put(Task(run, cancel))

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """End requests whose id starts with `rid`, or all. Unknown ids and "" are ignored, and so
        is an engine that has stopped: its requests have ended already, or run elsewhere."""
        if rid or abort_all:
            self._abort(lambda live: [r for r in live if abort_all or r.rid.startswith(rid)])

    def abort_requests(self, requests: Sequence[Request]) -> None:
        """End exactly these requests, if they still run: their caller has gone."""
        self._abort(lambda live: [request for request in requests if request in live])

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine thread between steps; its value or its exception."""
        return self.ask(function).result()

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """`call` that does not wait."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(Task(run, future.set_exception))
        return future

    def ask_idle(self) -> Future[bool]:
        """Whether nothing is queued or running."""
        return self.ask(lambda: self._scheduler.idle)

    @property
    def tokens_done(self) -> int:
        """Of the requests that run, tokens whose keys and values are scheduled: read at any moment
        of the engine thread, in a few microseconds."""
        return int(self._scheduler.slots.most_kv.sum())

    def _abort(self, choose: Choice) -> None:
        """End those requests that `choose` picks of all that run."""

        def run() -> None:
            for request in choose(self._scheduler.live):
                finish(request, dict(ABORTED), self._scheduler)

        try:
            self._inbox.put(Task(run, lambda error: self._left.aborts.append(choose)))
        except RuntimeError:
            logger.debug("an abort came after the engine had stopped, or in a forked process")
            self._left.aborts.append(choose)
