"""What callers ask of the engine thread, in order. No jax."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable

from jaxserve.errors import EngineDeadError, EngineShutdownError, RequestFailedError
from jaxserve.process import Home
from jaxserve.signals import Signal

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """run: called on the engine thread between steps. cancel: called instead, with the reason, when
    the engine stops first."""

    run: Callable[[], None]
    cancel: Callable[[BaseException], None]

    def perform(self) -> None:
        """`run`. One that fails costs its caller, not the engine and not the tasks behind it."""
        try:
            self.run()
        except Exception as error:
            logger.exception("a task of a caller failed")
            self.cancel(RequestFailedError.caused_by(error))


class Inbox:
    """A queue of tasks that can be closed for good. Thread-safe, whatever interrupts a caller.

    The collector may drop a call, and put its abort, at any allocation: hence a re-entrant lock.
    Ctrl-C may come at any call of a Python function, so that leaving `with threading.Condition()`
    may leave it locked for ever: hence a lock that is entered and left in C.
    """

    def __init__(self) -> None:
        self._home = Home()
        self._lock = threading.RLock()
        self._signal = Signal()
        self._tasks: list[Task] = []
        self._closed: BaseException | None = None

    def put(self, task: Task) -> None:
        """Raises EngineShutdownError or EngineDeadError once the inbox is closed, and
        ForkedProcessError where nobody reads it."""
        self._home.check()
        with self._lock:
            if self._closed is not None:
                raise stop_error(self._closed)
            self._tasks.append(task)
        # Not under the lock: a signal handler may come in where a function is called, and wait for
        # the engine thread, which wants the lock.
        self._signal.set()

    def take(self, block: bool) -> list[Task] | None:
        """All tasks so far; waits for one if `block`. None when closed."""
        while True:
            with self._lock:
                if self._closed is not None:
                    return None
                if self._tasks or not block:
                    return self._take()
            self._signal.wait()

    def close(self, reason: BaseException) -> BaseException:
        """Refuse further tasks and cancel those left. The first reason stays, and is returned."""
        with self._lock:
            if self._closed is None:
                self._closed = reason
            reason = self._closed
            tasks = self._take()
            self._signal.set()
        for task in tasks:
            task.cancel(stop_error(reason))
        return reason

    def _take(self) -> list[Task]:
        # Not copied and cleared: `put` may come in between.
        tasks, self._tasks = self._tasks, []
        return tasks


def stop_error(reason: BaseException) -> BaseException:
    """The exception a caller gets: a fresh one each time, with the failure as its cause."""
    if isinstance(reason, EngineShutdownError):
        return EngineShutdownError(str(reason))
    error = EngineDeadError(f"the engine has failed: {type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error
