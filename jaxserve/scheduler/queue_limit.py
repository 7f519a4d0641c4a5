"""How many requests may wait. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxserve.errors import InvalidRequestError
from jaxserve.request import Request
from jaxserve.scheduler.policy import WaitingQueue


@dataclasses.dataclass(frozen=True)
class QueueLimit:
    """The option `max_queued_requests`."""

    most: int | None
    """Requests that may wait; None is no limit."""
    priorities: bool
    """The worst of the queue make way, instead of those that come last."""

    def check(self, waiting: int, more: int) -> None:
        """InvalidRequestError: `more` requests beside `waiting` are too many."""
        if self.most is not None and not self.priorities and waiting + more > self.most:
            raise InvalidRequestError(
                f"the queue is full: max_queued_requests={self.most}, {waiting} requests wait and "
                f"{more} more were submitted"
            )

    def shed(self, waiting: WaitingQueue) -> Iterator[tuple[Request, InvalidRequestError]]:
        """Requests that are to fail, and with what; whoever iterates takes each out of `waiting`
        before the next."""
        while self.priorities and self.most is not None and len(waiting) > self.most:
            worst = waiting.last().request
            yield (
                worst,
                InvalidRequestError(
                    f"the queue is full: max_queued_requests={self.most}, and the others in it go "
                    f"before the request {worst.rid!r} of priority {worst.priority}"
                ),
            )
