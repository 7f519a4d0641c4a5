"""Payloads of a pretended device, from which a test can tell what each request must be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.config.states import HIDDEN, LAYERS, LOGITS
from jaxserve.output.extras import Extra, ExtraSpec
from jaxserve.packing.batch import Batch, ExtendBatch
from jaxserve.packing.pack import read_of_prompt

if TYPE_CHECKING:
    from jaxserve.step.picking import Picker

MOST_TOP = 8
"""Columns of the best logprobs."""


def pack_logprobs(tokens: Sequence[int] | np.ndarray, ids: Sequence[int] = ()) -> np.ndarray:
    """As a step reports it (output.logprobs.Columns): a token's logprob is minus its id, the best
    are -0.5, -1.5, ... of ids 0, 1, ..., those of named ids -3."""
    ranks = np.arange(MOST_TOP)
    floats = np.full((len(tokens), 1 + MOST_TOP + len(ids)), -3, np.float32)
    floats[:, 0] = -np.asarray(tokens)
    floats[:, 1 : 1 + MOST_TOP] = -0.5 - ranks
    columns = np.full((len(tokens), 1), MOST_TOP)
    best = np.broadcast_to(ranks, (len(tokens), MOST_TOP))
    return np.hstack([columns, floats.view(np.int32), best]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class MarkSpec(ExtraSpec):
    """Asks for a mark of each output, and of the prompt from position `start` on (-1: none)."""

    start: int = -1

    def extra(self, prompt_len: int) -> Marks:
        return Marks(range(self.start, prompt_len) if self.start >= 0 else range(0))


class Marks(Extra[list[float]]):
    """A token's mark is its id and a half; unlike logprobs, a prompt's last position has one."""

    name = "marks"

    def empty(self) -> list[float]:
        return []

    def values(self, opened: np.ndarray, start: int, count: int) -> list[float]:
        return opened[start : start + count].tolist()

    def as_meta(self, collected: Any, first: int, view: Any) -> dict[str, Any]:
        return {"prompt_marks": collected.prompt, "marks": collected.output[first:]}


STATES = (HIDDEN, LAYERS, LOGITS)


def pick(key: tuple[str, int], source: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """As the program `key` gathers."""
    lead = 1 if "_prompt_" in key[0] else 2
    assert len(source) == key[1] or lead == 2
    assert key[0].endswith(f"_{len(rows)}")
    return source.reshape(-1, *source.shape[lead:])[rows]


def kept_states(batch: Batch, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """By name, [n, B, 1] of tokens [n, B]: those that somebody wants. A position's state is the
    token drawn from it, and a half."""
    rows = np.zeros((len(tokens), batch.row_bucket, 1))
    rows[:, : tokens.shape[1], 0] = tokens + 0.5
    return {name: rows for name in STATES if name in batch.wanted.names}


def sampled_payloads(batch: Batch, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """By name, [n, B, ...] of tokens [n, B]: those that somebody wants."""
    made = {"logprobs": np.stack([pack_logprobs(row) for row in tokens]), "marks": tokens + 0.5}
    return {name: made[name] for name in batch.wanted.names if name in made}


def prompt_payloads(batch: Batch, picker: Picker) -> dict[str, Any]:
    """By name, [T, ...]: those that somebody wants of an extend batch. A row's mark and its states
    are those of its own token, its logprob that of the next; rows that nobody wants are 0."""
    if not isinstance(batch, ExtendBatch):
        return {}
    names = set().union(*(read_of_prompt(row) for row in batch.rows))
    logprobs = np.zeros((batch.tokens, pack_logprobs([0]).shape[1]), np.int32)
    marks = np.zeros(batch.tokens)
    for row in batch.rows:
        if read_of_prompt(row):
            known = [*row.sequence.request.prompt_ids, 0]
            rows = slice(row.packed_start, row.packed_start + row.stop - row.start)
            marks[rows] = np.asarray(known[row.start : row.stop]) + 0.5
            logprobs[rows] = pack_logprobs(known[row.start + 1 : row.stop + 1])
    made = {"logprobs": logprobs, "marks": marks}
    states = {name: marks[:, None] for name in STATES if name in names}
    picked = {name: picker.prompts(batch, name, each) for name, each in states.items()}
    return {name: made[name] for name in names if name in made} | picked
