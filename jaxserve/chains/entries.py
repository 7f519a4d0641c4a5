"""What the device is told of rows with chains as they begin. No jax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxserve.chains.use import ChainUse, DrawnLogprobs
from jaxserve.packing.batch import ExtendBatch, ExtendRow
from jaxserve.request import Request


class Admission(NamedTuple):
    """What the device is told of a request with a chain that begins a slot."""

    chain: ChainUse
    slot: int
    tokens: np.ndarray
    """[n] int32: outputs that it has already."""
    logprobs: np.ndarray
    """[n] float32: theirs; 0 where the chain does not read any."""


class Entries(NamedTuple):
    """Of one extend step."""

    admissions: tuple[Admission, ...]
    """Of rows that begin a slot."""
    hooks: tuple[tuple[ChainUse, int], ...]
    """And of those with a hook: it, and the slot."""
    pages: np.ndarray
    """[n] int32: pages whose tokens the device is to know, because a chain reads history."""
    tokens: np.ndarray
    """[n, S] int32: theirs."""

    @classmethod
    def of(cls, batch: ExtendBatch, page_size: int) -> Entries | None:
        """None: there is nothing to say."""
        rows = [row for row in batch.rows if row.sequence.request.apart and not row.carried]
        if not rows:
            return None
        hooks = [(row.sequence.request.hook, row.sequence.slot) for row in rows if row.fresh]
        found = [
            _noted_pages(row, page_size)
            for row in rows
            if (use := row.sequence.request.chain) and use.chain.reads_history
        ]
        pages = [np.empty(0, np.int32), *(each for each, _ in found)]
        tokens = [np.empty((0, page_size), np.int32), *(each for _, each in found)]
        fresh = [row for row in rows if row.fresh and row.sequence.request.chain]
        of_hooks = tuple((use, slot) for use, slot in hooks if use is not None)
        return cls(
            tuple(map(_admission, fresh)), of_hooks, np.concatenate(pages), np.concatenate(tokens)
        )


def _admission(row: ExtendRow) -> Admission:
    sequence, use = row.sequence, row.sequence.request.chain
    assert use is not None
    kept = sequence.total_tokens - sequence.prompt_len
    tokens = sequence.tokens(sequence.prompt_len, sequence.total_tokens)
    logprobs = np.zeros(kept, np.float32)
    if use.chain.reads_logprobs:
        logprobs[:] = _drawn_logprobs(sequence.request)[:kept]
    return Admission(use, sequence.slot, tokens, logprobs)


def _drawn_logprobs(request: Request) -> list[float]:
    return next(extra.kept for extra in request.extras if isinstance(extra, DrawnLogprobs))


def _noted_pages(row: ExtendRow, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pages that a row's tokens are in, from the first token that is not noted yet, and what
    they hold then."""
    first = (0 if row.fresh else row.start) // size
    last = -(-row.stop // size)
    tokens = np.zeros((last - first) * size, np.int32)
    tokens[: row.stop - first * size] = row.sequence.tokens(first * size, row.stop)
    return np.array(row.sequence.pages[first:last], np.int32), tokens.reshape(-1, size)
