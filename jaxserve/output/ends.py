"""Requests that have ended and are told so when the rows that they ended with are on the host. No
jax."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxserve.errors import RequestFailedError
from jaxserve.output.commit import failure_reason, report
from jaxserve.output.picked import Picked, Places, on_host
from jaxserve.request import Request, Update

if TYPE_CHECKING:
    from jaxserve.step.result import StepResult

logger = logging.getLogger(__name__)


class Ends:
    """One step late, so that nobody waits: the rows are gathered behind the step that the device
    runs meanwhile. The engine thread's."""

    def __init__(self, pick: Callable[[StepResult, Places], Mapping[str, Picked]]) -> None:
        """pick: sends rows of a result's arrays to the host, by name."""
        self._pick = pick
        self._result: StepResult | None = None
        self._ended: list[Request] = []
        self._waiting: list[tuple[Sequence[Request], Mapping[str, Picked]]] = []

    def of(self, result: StepResult) -> list[Request]:
        """An empty list for requests that end with `result` and have extras that are read then."""
        self._result = result
        return self._ended

    def gather(self) -> None:
        """Queue the gathers for those that are in the list now."""
        result, self._result = self._result, None
        if not self._ended:
            return
        assert result is not None
        requests, self._ended = self._ended, []
        places: dict[str, list[tuple[int, int]]] = {}
        for extra in (extra for request in requests for extra in request.extras if extra.at_end):
            assert extra.place is not None
            places.setdefault(extra.name, []).append(extra.place)
        try:
            self._waiting.append((requests, self._pick(result, places)))
        except Exception as error:
            _lose(requests, error)

    def hand_out(self) -> None:
        """Tell the callers of all that wait. Those whose rows are lost with the device fail."""
        self.gather()  # where a commit has failed half way
        waiting, self._waiting = self._waiting, []
        for requests, picked in waiting:
            try:
                arrays = {name: on_host(each) for name, each in picked.items()}
            except Exception as error:
                _lose(requests, error)
                continue
            for request in requests:
                for extra in request.extras:
                    if extra.at_end:
                        extra.read_end(arrays)
                report(request)


def _lose(requests: Sequence[Request], error: Exception) -> None:
    logger.error("the last rows of %d requests were lost", len(requests), exc_info=error)
    failure = RequestFailedError.caused_by(error)
    for request in requests:
        request.finish_reason = failure_reason(failure)
        request.mailbox.put(Update(request, error=failure, finish_reason=request.finish_reason))
