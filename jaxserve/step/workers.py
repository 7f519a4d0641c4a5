"""Threads that go through a list of jobs which may take XLA seconds each, and can be left."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from jaxserve.process import Home, end_despite, interrupt

Job = TypeVar("Job")
LEAVING_SECONDS = 1.0
"""How long the end of the program waits for jobs that are under way."""
LOOK_SECONDS = 0.05


class Left(BaseException):
    """Ends a job that is in Python code (a trace) when the program ends."""


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
        with contextlib.suppress(Left):
            with contextlib.suppress(IndexError, Left):
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
        """At the end of the program. A thread that is in Python code must be out of it before: the
        interpreter would unwind it through C++ code of JAX that calls Python, and crash (3.12)."""
        self.stop()
        if self._home.left:
            return
        said, sys.unraisablehook = sys.unraisablehook, lambda what: None
        deadline = time.monotonic() + LEAVING_SECONDS
        while self._alive() and time.monotonic() < deadline:
            for thread in self._alive():  # again: what C calls in Python may lose it, and say so
                interrupt(thread, Left)
            self.wait(LOOK_SECONDS)
        sys.unraisablehook = said
        if self._alive() and not end_despite():
            self.wait()

    def _alive(self) -> list[threading.Thread]:
        return [thread for thread in self._threads if thread.is_alive()]
