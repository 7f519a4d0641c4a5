"""What callers ask of the engine thread, in order. No jax."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from jaxserve.errors import EngineDeadError, EngineShutdownError


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """run: called on the engine thread between steps. cancel: called instead, with the reason, when
    the engine stops first."""

    run: Callable[[], None]
    cancel: Callable[[BaseException], None]


class Inbox:
    """A queue of tasks that can be closed for good. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: list[Task] = []
        self._closed: BaseException | None = None

    def put(self, task: Task) -> None:
        """Raises EngineShutdownError or EngineDeadError once the inbox is closed."""
        with self._changed:
            if self._closed is not None:
                raise stop_error(self._closed)
            self._tasks.append(task)
            self._changed.notify()

    def take(self, block: bool) -> list[Task] | None:
        """All tasks so far; waits for one if `block`. None when closed."""
        with self._changed:
            while block and not self._tasks and self._closed is None:
                self._changed.wait()
            if self._closed is not None:
                return None
            return self._take()

    def close(self, reason: BaseException) -> BaseException:
        """Refuse further tasks and cancel those left. The first reason stays, and is returned."""
        with self._changed:
            if self._closed is None:
                self._closed = reason
            reason = self._closed
            tasks = self._take()
            self._changed.notify_all()
        for task in tasks:
            task.cancel(stop_error(reason))
        return reason

    def _take(self) -> list[Task]:
        # Not a copy: the collector may drop a call, and put its abort, at any allocation.
        tasks, self._tasks = self._tasks, []
        return tasks


def stop_error(reason: BaseException) -> BaseException:
    """The exception a caller gets: a fresh one each time, with the failure as its cause."""
    if isinstance(reason, EngineShutdownError):
        return EngineShutdownError(str(reason))
    error = EngineDeadError(f"the engine has failed: {type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error
