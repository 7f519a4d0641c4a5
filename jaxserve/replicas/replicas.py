"""Several engine loops behind one engine: a `core.Core` over replicas of one model.

Requests go to one replica each (`router`). A replica whose loop fails leaves its requests to the
others: they go on from the tokens that they have, as retracted ones do, and their callers hear of
each token once, because it was the request that counted what was reported.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from jaxserve.apart import Apart
from jaxserve.errors import EngineDeadError, EngineShutdownError
from jaxserve.inbox import stop_error
from jaxserve.leftovers import Leftovers
from jaxserve.process import Home, Uncopyable
from jaxserve.replicas.replica import Replica
from jaxserve.replicas.router import Group, Router, groups_of
from jaxserve.replicas.totals import total
from jaxserve.request import Request

if TYPE_CHECKING:
    from jaxserve.api.profile import ProfileSpec
    from jaxserve.config import Limits
    from jaxserve.loop import EngineLoop

logger = logging.getLogger(__name__)
T = TypeVar("T")
GONE = (EngineDeadError, EngineShutdownError)


class Replicas(Uncopyable):
    """A `core.Core`. No lock is held while a loop is called, so that the collector, a signal or a
    loop that fails may come in at any moment."""

    def __init__(self, router: Router, replicas: list[Replica], startup_seconds: float) -> None:
        """replicas: with their loops, which `stopped` hears of. startup_seconds: of all."""
        self._router = router
        self._replicas = replicas
        self._startup_seconds = startup_seconds
        self._profiled: Replica | None = None
        self._home = Home()
        for replica in replicas:
            replica.watched_by(self._stopped)

    @property
    def limits(self) -> Limits:
        """The same for all."""
        return self._replicas[0].loop.limits

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """As `EngineLoop.submit`. A request that is pinned to a replica that has failed is an
        EngineDeadError."""
        self._home.check()  # before the router's lock, which a forked process may never get
        parts = self._parts(groups_of(requests))
        try:
            for replica, groups in parts.items():
                replica.loop.check_room(sum(map(len, groups)))
            now = time.perf_counter()
            for request in requests:
                request.submitted_time = now
            homeless = self._queue(parts)
        except BaseException:  # Ctrl-C, too
            for replica, groups in parts.items():
                self._router.take_back(groups, replica)
            raise
        for groups in homeless:
            self._place(groups)

    def _parts(self, groups: list[Group]) -> dict[Replica, list[Group]]:
        """To whom these prompts go. The prompts of one call are pinned to one replica, or none."""
        rank = groups[0][0].routed_dp_rank
        if rank is None:
            return self._router.route(groups, self._alive())
        replica = self._replicas[rank]
        if replica.failure is not None:
            raise _dead([replica])
        self._router.pin(groups, replica)
        return {replica: groups}

    def _queue(self, parts: dict[Replica, list[Group]]) -> list[list[Group]]:
        """Queue prompts where they were routed, and take them out of `parts`; those whose replica
        has failed since."""
        homeless = []
        while parts:
            replica, groups = parts.popitem()
            try:
                replica.loop.queue([request for group in groups for request in group])
            except EngineDeadError as error:  # `_stopped` comes for what it had
                replica.failure = error.__cause__ or error
                homeless.append(groups)
        return homeless

    def _place(self, groups: list[Group]) -> None:
        """Queue prompts on any replica that runs. EngineDeadError: none does."""
        waiting = [groups]
        while waiting:
            waiting += self._queue(self._router.route(waiting.pop(), self._alive()))

    def _alive(self) -> list[Replica]:
        alive = [replica for replica in self._replicas if replica.runs]
        if not alive:
            raise _dead(self._replicas)
        return alive

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """As `EngineLoop.abort`, on all replicas."""
        self._abort(lambda loop: loop.abort(rid, abort_all))

    def abort_requests(self, requests: Sequence[Request]) -> None:
        """As `EngineLoop.abort_requests`, wherever they are."""
        self._abort(lambda loop: loop.abort_requests(requests))

    def _abort(self, tell: Callable[[EngineLoop], None]) -> None:
        """On all replicas. One that has failed keeps what it is told until its requests have moved,
        and they are aborted then; what comes when they have is told to the others once more."""
        while True:
            before = [replica.moved for replica in self._replicas]
            for replica, moved in zip(self._replicas, before, strict=True):
                if not moved:
                    tell(replica.loop)
            if before == [replica.moved for replica in self._replicas]:
                return

    # -- on the thread of a replica that has stopped ----------------------------------------------

    def _stopped(self, replica: Replica, left: Leftovers) -> None:
        """Let its requests go on elsewhere. If nobody runs any more, they fail with its reason."""
        assert left.reason is not None
        if isinstance(left.reason, EngineShutdownError):
            left.tell(left.requests)
            return
        replica.failure, replica.counters = left.reason, left.counters
        logger.error("replica %d has failed: %r", replica.rank, left.reason)
        groups = groups_of(left.requests)
        try:
            while groups:  # one at a time: the last of the others may fail on the way
                self._place(groups[:1])
                groups.pop(0)
        except GONE:
            logger.error("%d of its prompts fail: no replica runs", len(groups))
        finally:
            left.tell(request for group in groups for request in group)
        replica.moved = True
        moved = dict.fromkeys(left.requests)
        while left.aborts:
            self.abort_requests(list(left.aborts.popleft()(moved)))

    # -- control ----------------------------------------------------------------------------------

    def flush_cache(self) -> bool:
        """As `EngineLoop.flush_cache`: nothing is forgotten while any replica has requests."""
        if not all(self._ask(lambda loop: loop.ask_idle()).values()):
            return False
        self._router.forget_prefixes()
        return all(self._ask(lambda loop: loop.ask_flush()).values())

    def stats(self) -> dict[str, Any]:
        """Counters of all replicas together, and `replicas`, a list of each one's. EngineDeadError,
        EngineShutdownError: none runs."""
        answers = self._ask(lambda loop: loop.ask_stats())
        for replica, counters in answers.items():
            replica.counters = counters
        rows = [replica.report(running=replica in answers) for replica in self._replicas]
        return {**total(rows), "startup_time": self._startup_seconds, "replicas": rows}

    def _ask(self, ask: Callable[[EngineLoop], Future[T]]) -> dict[Replica, T]:
        """The answers of those that run. EngineDeadError, EngineShutdownError: none does."""
        asked: dict[Replica, Future[T]] = {}
        answers: dict[Replica, T] = {}
        failure: EngineDeadError | None = None
        for replica in self._alive():
            try:
                asked[replica] = ask(replica.loop)
            except EngineDeadError as error:
                failure = error
        for replica, future in asked.items():
            try:
                answers[replica] = future.result()
            except EngineDeadError as error:
                failure = error
        if failure is not None and not answers:
            raise failure
        return answers

    @property
    def apart(self) -> Apart:
        """As `EngineLoop.apart`, of all replicas that run."""
        return Apart([replica.loop for replica in self._alive()])

    def start_profile(self, spec: ProfileSpec) -> None:
        """As `EngineLoop.start_profile`: JAX's profiler traces all of the process. Steps are
        counted on the first replica that runs."""
        self._profiled = self._alive()[0]
        self._profiled.loop.start_profile(spec)

    def stop_profile(self) -> None:
        """As `EngineLoop.stop_profile`."""
        profiled = self._profiled
        if profiled is None or not profiled.runs:  # its profile has ended with it
            profiled = self._alive()[0]
        profiled.loop.stop_profile()

    def shutdown(self) -> None:
        """As `EngineLoop.shutdown`, all at once."""
        for replica in self._replicas:
            replica.loop.close()
        for replica in self._replicas:
            replica.loop.shutdown()


def _dead(replicas: Iterable[Replica]) -> BaseException:
    """What a caller gets who comes when these replicas have failed."""
    failures = {replica.rank: replica.failure for replica in replicas}
    last = list(failures.values())[-1]
    assert last is not None
    if len(failures) == 1:
        (rank,) = failures
        error = EngineDeadError(f"replica {rank} has failed: {type(last).__name__}: {last}")
        error.__cause__ = last
        return error
    return stop_error(last)
