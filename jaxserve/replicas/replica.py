"""One engine loop among several, as the router sees it. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from jaxserve.leftovers import Leftovers
from jaxserve.request import Request

if TYPE_CHECKING:
    from jaxserve.loop import EngineLoop


@dataclasses.dataclass(slots=True)
class Load:
    """What a replica has to do, running and waiting."""

    requests: int = 0
    tokens: int = 0
    """Of prompts and outputs, at most."""


def tokens_of(request: Request) -> int:
    """What a request may come to."""
    return len(request.prompt_ids) + request.max_new_tokens


class Replica:
    """A `leftovers.Owner` of one loop. What it was given is counted by the router, under its lock;
    what has ended, by the engine thread: so neither waits for the other."""

    def __init__(self, rank: int, devices: list[Any]) -> None:
        """rank: its row of the mesh, dp_rank. devices: of that row, jax.Devices."""
        self.rank = rank
        self.devices = devices
        self.failure: BaseException | None = None
        """Why it can be given nothing any more."""
        self.counters: dict[str, Any] = {}
        """The last that were read; at the end, those of a replica that has failed."""
        self.moved = False
        """Its requests have gone elsewhere since."""
        self._stopped: Callable[[Replica, Leftovers], None] = _tell_all
        self._given, self._ended = Load(), Load()
        self._loop: EngineLoop | None = None

    @property
    def loop(self) -> EngineLoop:
        """What runs its requests."""
        assert self._loop is not None, "the replica has not been started"
        return self._loop

    def run_by(self, loop: EngineLoop) -> None:
        """Before the first request."""
        self._loop = loop

    def watched_by(self, stopped: Callable[[Replica, Leftovers], None]) -> None:
        """stopped: called once, on the engine thread, when the loop has ended."""
        self._stopped = stopped

    def give_up(self) -> None:
        """Another one cannot be started."""
        if self._loop is not None:
            self._loop.shutdown()

    @property
    def runs(self) -> bool:
        """Whether it can be given requests."""
        return self.failure is None

    def report(self, running: bool) -> dict[str, Any]:
        """What `get_server_info()` says of it. running: its counters are those of now."""
        failure = self.failure
        return {
            **self.counters,
            "dp_rank": self.rank,
            "devices": [str(device) for device in self.devices],
            "status": "ready" if running else "failed",
            "error": None if failure is None else f"{type(failure).__name__}: {failure}",
        }

    @property
    def load(self) -> Load:
        """Now, or a moment ago."""
        given, ended = self._given, self._ended
        tokens = given.tokens - ended.tokens - self.loop.tokens_done
        return Load(given.requests - ended.requests, max(tokens, 0))

    def give(self, requests: Iterable[Request]) -> None:
        """They are going to be queued here."""
        for request in requests:
            request.dp_rank = self.rank
            _add(self._given, request, 1)

    def take_back(self, requests: Iterable[Request]) -> None:
        """They are not."""
        for request in requests:
            _add(self._given, request, -1)

    # -- on the engine thread ---------------------------------------------------------------------

    def ended(self, request: Request) -> None:
        _add(self._ended, request, 1)

    def stopped(self, left: Leftovers) -> None:
        self._stopped(self, left)


def _tell_all(replica: Replica, left: Leftovers) -> None:
    left.tell(left.requests)


def _add(load: Load, request: Request, sign: int) -> None:
    load.requests += sign
    load.tokens += sign * tokens_of(request)
