"""What an engine loop that stops leaves behind, and who hears of it. No jax."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from jaxserve.inbox import stop_error
from jaxserve.output.commit import failure_reason, report
from jaxserve.request import Request, Update

if TYPE_CHECKING:
    from jaxserve.packing.sequence import Sequence

logger = logging.getLogger(__name__)
MOST_ABORTS = 1024
"""Kept of those that a stopped loop was asked for."""

Choice = Callable[[Mapping[Request, Any]], Iterable[Request]]
"""Which of the requests that run an abort is for."""


@dataclasses.dataclass(eq=False, slots=True)
class Leftovers:
    """The requests of a loop that has stopped, in the order in which they came. They have all
    tokens that were read, and belong to nobody now."""

    reason: BaseException | None = None
    """Why it stopped: a failure, or EngineShutdownError."""
    requests: list[Request] = dataclasses.field(default_factory=list)
    aborts: deque[Choice] = dataclasses.field(default_factory=lambda: deque(maxlen=MOST_ABORTS))
    """What it was asked to abort and did not. More may come from other threads."""
    counters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The last; empty where they could not be read."""

    def tell(self, requests: Iterable[Request]) -> None:
        """End these requests with the reason."""
        assert self.reason is not None
        for request in requests:
            error = stop_error(self.reason)
            request.finish_reason = failure_reason(error)
            request.mailbox.put(Update(request, error=error, finish_reason=request.finish_reason))


class Owner(Protocol):
    """Whom a loop works for. Called on its engine thread."""

    def ended(self, request: Request) -> None:
        """A request has ended."""
        ...

    def stopped(self, left: Leftovers) -> None:
        """The loop has ended. `left.requests` are to be told, or to go on elsewhere."""
        ...


class Nobody:
    """An owner for which nothing goes on elsewhere."""

    def ended(self, request: Request) -> None:
        pass

    def stopped(self, left: Leftovers) -> None:
        left.tell(left.requests)


def collect_left(live: Mapping[Request, Sequence]) -> list[Request]:
    """The requests of a scheduler that has stopped, as if they had been retracted. It may be what
    has failed: what cannot be read of one is computed again."""
    left = []
    for request, sequence in live.items():
        if request.finished:  # and its caller had not heard of it
            report(request)
            continue
        try:
            if sequence.admitted:
                sequence.drain()
                request.count_retraction()
        except Exception:
            logger.exception("the last tokens of request %s are lost", request.rid)
        left.append(request)
    return left
