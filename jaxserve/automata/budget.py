"""What making an automaton may take."""

from __future__ import annotations

import time

from jaxserve.errors import InvalidRequestError
from jaxserve.shown import quoted


class Budget:
    """Of one regular expression: seconds, and sizes that are named in messages."""

    def __init__(self, regex: str, seconds: float) -> None:
        self._regex, self._seconds = regex, seconds
        self._end = time.monotonic() + seconds

    def check(self, what: str, size: int, most: int) -> None:
        """InvalidRequestError: `size` of `what` is more than `most`, or the time is over."""
        if size > most:
            self._refuse(f"it needs more than {most:,} {what}")
        if time.monotonic() > self._end:
            self._refuse(f"making its table takes more than {self._seconds:g} seconds")

    def dead(self) -> InvalidRequestError:
        """What an expression is that no tokens match."""
        return InvalidRequestError(f"regex={quoted(self._regex)}: no text of these tokens matches")

    def _refuse(self, reason: str) -> None:
        raise InvalidRequestError(
            f"regex={quoted(self._regex)} is too large for an automaton: {reason}; counted "
            "repetition multiplies, and classes of all languages have many bytes (the sampling "
            "parameter `regex` has no such limits)"
        )
