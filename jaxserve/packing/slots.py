"""What changes with every decoded token, for all slots at once: a step then costs the host a few
array operations, whatever the number of rows. No jax."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.packing.parts import Part, fused_of, parts_of
from jaxserve.packing.wanted import Wanted
from jaxserve.request import Request

if TYPE_CHECKING:
    from jaxserve.packing.sequence import Sequence

MAX_STOPS = 8
"""End tokens that are compared here; requests with more are looked at one by one."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The running sequences in the order of a batch's rows, and what of them stays the same from
    step to step: made anew when one comes or goes.

    slots, epochs, limit, simple [n] and stops [n, MAX_STOPS] as in Slots. watched: one of them
    streams. wanted: beside tokens. parts: by the programs that draw; () is the usual one for all.
    fused: the chain that draws all parts in the model's own program, see `fused_of`. guided: the
    numbers of rows with guides.
    """

    sequences: tuple[Sequence, ...]
    slots: np.ndarray
    epochs: np.ndarray
    limit: np.ndarray
    stops: np.ndarray
    simple: np.ndarray
    all_simple: bool
    wanted: Wanted
    watched: bool
    parts: tuple[Part, ...]
    fused: str
    guided: tuple[int, ...]


class Slots:
    """Progress of the sequences in R slots, as arrays [R].

    What is scheduled are bounds: a step may make fewer tokens than it has room for, which `settle`
    takes back when it has been read. The device knows the true lengths.

    most_kv: tokens whose keys and values are in the pages when all steps in flight have run, at
    most. capacity: tokens that the pages hold. most_scheduled: output tokens then, at most.
    produced: output tokens read back. limit: output tokens allowed, at least 1. epoch: counts the
    slot's owners, so that a step's result can tell whether its row is still the same sequence.
    simple: nobody needs to hear of a token before the end.
    """

    def __init__(self, count: int, pending: int = 1024, replays: bool = False):
        """pending: outputs that a slot keeps before they move into its request's list. replays: a
        request that comes back decodes the outputs again that it has already; until they are
        passed, `produced` is less than their number."""
        self.replays = replays
        self.most_kv = np.zeros(count, np.int32)
        self.capacity = np.zeros(count, np.int32)
        self.most_scheduled = np.zeros(count, np.int32)
        self.produced = np.zeros(count, np.int32)
        self.limit = np.zeros(count, np.int32)
        self.epoch = np.zeros(count, np.int64)
        self.simple = np.zeros(count, bool)
        self._stops = np.full((count, MAX_STOPS), -1, np.int32)
        self._pending = np.zeros((count, pending), np.int32)  # output i is at i % pending
        self._free = list(range(count - 1, -1, -1))

    def reset(self) -> None:
        """All slots are free, whoever has them."""
        self.epoch += 1
        for counts in (self.most_kv, self.capacity, self.limit, self.most_scheduled, self.produced):
            counts[:] = 0
        self._free = list(range(len(self.epoch) - 1, -1, -1))

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def in_flight(self) -> bool:
        """Whether any slot has a sampled token that the host has not read."""
        return bool((self.most_scheduled != self.produced).any())

    def growth(self, tokens: int, page_size: int) -> int:
        """Pages that all sequences together begin within `tokens` more tokens each."""
        if len(self._free) == len(self.limit):
            return 0
        ahead = np.minimum(self.limit - self.most_scheduled, tokens)
        missing = np.maximum(self.most_kv + ahead - self.capacity, 0)
        return int((-(-missing // page_size)).sum())

    def kept(self, request: Request) -> int:
        """Outputs that a waiting request need not decode any more."""
        return 0 if self.replays else len(request.output_ids)

    def take(self, request: Request) -> int:
        """A free slot for `request`, which has cached nothing yet."""
        slot = self._free.pop()  # its numbers are 0
        self.most_scheduled[slot] = self.produced[slot] = self.kept(request)
        self.limit[slot] = max(request.max_new_tokens, 1)
        stops = sorted(request.stop_ids)
        self.simple[slot] = (
            len(stops) <= MAX_STOPS
            and request.stop_matcher is None
            and all(extra.at_end for extra in request.extras)
            and not request.stream_interval
            and request.max_new_tokens > 0
        )
        self._stops[slot] = -1
        if self.simple[slot]:
            self._stops[slot, : len(stops)] = stops
        return slot

    def release(self, slot: int) -> None:
        self.epoch[slot] += 1
        self.most_kv[slot] = self.capacity[slot] = self.limit[slot] = 0
        self.most_scheduled[slot] = self.produced[slot] = 0
        self._free.append(slot)

    def rows(self, sequences: tuple[Sequence, ...]) -> Rows:
        """The admitted `sequences` as rows."""
        slots = np.fromiter((s.slot for s in sequences), np.int32, len(sequences))
        simple = self.simple[slots]
        parts = parts_of(((i, s.request) for i, s in enumerate(sequences)), all_or_none=True)
        return Rows(
            sequences=sequences,
            slots=slots,
            epochs=self.epoch[slots],
            limit=self.limit[slots],
            stops=self._stops[slots],
            simple=simple,
            all_simple=bool(simple.all()),
            wanted=Wanted.of(s.request for s in sequences),
            watched=any(s.request.stream_interval for s in sequences),
            parts=parts,
            fused=fused_of(s.request for s in sequences) if parts else "",
            guided=tuple([i for i, s in enumerate(sequences) if s.request.guides]),
        )

    def advance(self, slots: np.ndarray, steps: int) -> None:
        """Count `steps` more tokens of each of `slots` [n] as scheduled. (`take` costs half of what
        an index array in brackets does.)"""
        self.most_kv[slots] = self.most_kv.take(slots) + steps
        self.most_scheduled[slots] = self.most_scheduled.take(slots) + steps

    def settle(self, slots: np.ndarray, missing: np.ndarray) -> None:
        """A step has been read that made `missing` [n] tokens fewer than were scheduled for
        `slots` [n], of owners that are still the same."""
        self.most_kv[slots] -= missing
        self.most_scheduled[slots] -= missing

    def append(
        self, slots: np.ndarray, tokens: np.ndarray, limit: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Take a new token [n] for each of `slots` [n], all simple, whose limit and stops are
        given. Which of them have ended, or have no room for another: `drain` those."""
        produced = self.produced.take(slots)
        room = self._pending.shape[1]
        self._pending[slots, produced % room] = tokens
        produced += 1
        self.produced[slots] = produced
        ended = (stops == tokens[:, None]).any(axis=1)
        ended |= produced >= limit
        ended |= produced % room == 0
        return ended

    def drain(self, slot: int, known: int) -> list[int]:
        """The outputs from number `known` on; none while those before are decoded again."""
        count = max(int(self.produced[slot]) - known, 0)
        start = known % self._pending.shape[1]
        return self._pending[slot, start : start + count].tolist()
