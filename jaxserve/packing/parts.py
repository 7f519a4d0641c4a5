"""Which rows of a batch are drawn by programs of their own. No jax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxserve.request import Request

PLAIN = "draw"
"""The kind of program that draws rows without a chain."""


class Part(NamedTuple):
    """Rows of a batch that one program draws, behind the model's."""

    kind: str
    """The chain's (`chains.use.Registered.kind`), or PLAIN."""
    rows: np.ndarray
    """[n] int32: their numbers in the batch."""


def parts_of(rows: Iterable[tuple[int, Request]], *, all_or_none: bool) -> tuple[Part, ...]:
    """The parts of the rows (number, request) that sample; () where none is `apart`. all_or_none:
    if one is, all are, because the model's program draws nobody then; otherwise it has drawn the
    others."""
    found: dict[str, list[int]] = {}
    some = False
    for number, request in rows:
        some = some or request.apart
        if request.apart or all_or_none:
            kind = request.chain.chain.kind if request.chain else PLAIN
            found.setdefault(kind, []).append(number)
    if not some:
        return ()
    return tuple(Part(kind, np.array(numbers, np.int32)) for kind, numbers in found.items())


def fused_of(requests: Iterable[Request]) -> str:
    """The kind of the chain that the rows' own program draws with, "" for none: the only one that
    they have, where nothing else wants them drawn apart."""
    kinds = set()
    for request in requests:
        use = request.chain
        if request.hook is not None or request.guides or (use and not use.chain.fused):
            return ""
        if use:
            kinds.add(use.chain.kind)
    return kinds.pop() if len(kinds) == 1 else ""
