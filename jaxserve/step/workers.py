"""Threads that go through a list of jobs which may take XLA seconds each, and can be left."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from jaxserve.process import Home, end_despite

Job = TypeVar("Job")
LEAVING_SECONDS = 0.5
"""How long the end of the program waits for jobs that are under way."""


class Workers(Generic[Job]):
    """Does jobs on several threads at a time, the first ones first.

    A job is never interrupted (XLA cannot be), but nobody has to wait for it: after `stop` no other
    one begins, and the program may end meanwhile.
    """

    def __init__(
        self,
        do: Callable[[Job], object],
        jobs: Iterable[Job],
        threads: int,
        stopped: threading.Event | None = None,
    ) -> None:
        """do: one job; its exceptions are kept in `errors`. The threads begin at once. stopped: is
        set when no other job is to begin, for jobs that wait for something."""
        self._do = do
        self._stopped = stopped or threading.Event()
        self._waiting = deque(jobs)
        self._errors: list[tuple[Job, BaseException]] = []
        self._lock = threading.Lock()
        self._home = Home()
        self._working = min(threads, len(self._waiting))
        self._threads = [
            threading.Thread(target=self._work, name="jaxserve-compile", daemon=True)
            for _ in range(self._working)
        ]
        if self._threads:
            atexit.register(self._leave)
        for thread in self._threads:
            thread.start()

    @property
    def errors(self) -> list[tuple[Job, BaseException]]:
        """Jobs that have failed so far, with their exceptions."""
        return list(self._errors)

    @property
    def busy(self) -> bool:
        """Whether any job is under way, or will be."""
        return self._working > 0

    def stop(self) -> None:
        """Begin no other job."""
        self._stopped.set()
        self._waiting.clear()

    def wait(self, seconds: float | None = None) -> None:
        """Until all jobs are done, or for `seconds`. An exception in here (Ctrl-C) stops them."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            for thread in self._threads:
                thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def finish(*work: Workers[Any]) -> None:
        """Wait for the jobs of all of them. Raises the first exception of a job."""
        try:
            for workers in work:
                workers.wait()
        except BaseException:
            for workers in work:
                workers.stop()
            raise
        for workers in work:
            for _, error in workers.errors:
                raise error

    def _work(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                job = self._waiting.popleft()
                try:
                    self._do(job)
                except Exception as error:
                    self._errors.append((job, error))
        with self._lock:
            self._working -= 1
            if not self._working:
                atexit.unregister(self._leave)

    def _leave(self) -> None:
        """At the end of the program."""
        self.stop()
        self.wait(LEAVING_SECONDS)
        if self.busy and not self._home.left and not end_despite():
            self.wait()
