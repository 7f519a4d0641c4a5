"""What the requests of a batch want beside tokens. No jax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.request import Request


class Wanted(NamedTuple):
    """Of all rows together."""

    names: frozenset[str] = frozenset()
    """Of the payloads that any row reads."""
    wide: bool = False
    """Whether any row needs more columns than the usual programs have, see `config.WIDE_TOP`."""

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Wanted:
        extras = [extra for request in requests for extra in request.extras]
        if not extras:
            return NOTHING
        return cls(frozenset(extra.name for extra in extras), any(extra.wide for extra in extras))


NOTHING = Wanted()
