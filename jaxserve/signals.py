"""Waking another thread. No jax."""

from __future__ import annotations

import threading


class Signal:
    """Wakes the one thread that waits for it, or is going to. Set twice it wakes once: waiters look
    again at what they wait for.

    Unlike threading.Event and Condition it is made of C calls only, so that Ctrl-C in either thread
    leaves nothing locked.
    """

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """From any thread; waits for nobody."""
        if self._unset.locked():
            try:
                self._unset.release()
            except RuntimeError:  # somebody else was faster, or the collector came in between
                return

    def wait(self, timeout: float | None = None) -> bool:
        """Until it is set, and unsets it. False after `timeout` seconds."""
        return self._unset.acquire(timeout=-1 if timeout is None else timeout)
