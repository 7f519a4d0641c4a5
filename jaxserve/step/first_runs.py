"""Before a program counts on several devices, it has run once while none of them waits for another.

Its first run loads its code, which may wait for what the device is doing. If that is a kernel that
waits for another device, which waits for the host, all wait until the kernel gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.parallel.peers import Peers
from jaxserve.step.catalogue import ProgramKey


class FirstRuns:
    """Which programs of one mesh have run, and their first runs."""

    def __init__(
        self,
        peers: Peers,
        queue: Callable[[ProgramKey, Any, Mapping[str, Any]], object],
        drain: Callable[[], None],
        nobody: Callable[[ProgramKey], Mapping[str, Any]],
    ) -> None:
        """queue: a program with arguments by name. drain: waits until the devices have nothing to
        do. nobody: as `Program.nobody`; nothing for what is no step, and has no kernels that
        wait."""
        self._quiet = peers.quiet
        self._queue = queue
        self._drain = drain
        self._nobody = nobody
        self._known: dict[ProgramKey, Any] = {}

    def before(self, key: ProgramKey, program: Any, given: Mapping[str, Any]) -> None:
        """Call whenever `program`, the executable of `key`, is about to run with `given`. If it has
        not run yet: waits for the devices, and lets the kernels of a step return at once in a run
        whose results nobody reads."""
        if self._quiet is None or self._known.get(key) is program:
            return
        self._drain()
        nobody = self._nobody(key)
        if nobody:
            self._queue(key, program, {**given, **nobody, "comm": self._quiet})
            self._drain()
        self._known[key] = program
