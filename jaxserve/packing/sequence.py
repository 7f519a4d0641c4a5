"""A request's place in the engine: its slot, its pages, how far it has come. No jax."""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np

from jaxserve.cache.prefix import Lease
from jaxserve.packing.slots import Slots
from jaxserve.request import Request


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """Progress of one request. Everything "scheduled" counts steps already handed to the device,
    which may be one ahead of the tokens the host has read. The numbers live in `slots` while the
    sequence is admitted, and are those of a fresh start otherwise.

    Invariants, while admitted: slot >= 0; len(pages) * page_size >= most_kv;
    most_kv <= total_tokens + in_flight; the first lease.count pages are also the prefix cache's.
    rank: less goes first, whatever the arrival. reused: tokens found in the prefix cache when it
    was admitted. dropped: leading pages that were given back because no token to come sees them;
    their numbers stay in `pages`, and nobody reads them. Only without a lease. media_rows: where on
    the device the pictures are whose tokens run (scheduler.stage), [prompt_len] int32, -1 for text;
    None: there is none.
    """

    request: Request
    arrival: int
    slots: Slots
    rank: float = 0
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    lease: Lease = dataclasses.field(default_factory=Lease)
    reused: int = 0
    dropped: int = 0
    media_rows: np.ndarray | None = None
    _prompt_bytes: bytes | None = None
    _prompt_keys: bytes | None = None

    @property
    def order(self) -> tuple[float, int]:
        """Less goes first; when pages run out, the greatest gives its own back."""
        return self.rank, self.arrival

    @property
    def admitted(self) -> bool:
        return self.slot >= 0

    @property
    def epoch(self) -> int:
        """The slot's, which has been another before this sequence was admitted and is another once
        it is released; -1 outside."""
        return self.slots.epoch.item(self.slot) if self.admitted else -1

    @property
    def most_kv(self) -> int:
        """Tokens whose keys and values are scheduled to be in the pages."""
        return self.slots.most_kv.item(self.slot) if self.admitted else 0

    @most_kv.setter
    def most_kv(self, tokens: int) -> None:
        self.slots.most_kv[self.slot] = tokens

    @property
    def capacity(self) -> int:
        """Tokens that its pages reach to."""
        return self.slots.capacity.item(self.slot)

    @property
    def in_flight(self) -> int:
        """Scheduled steps of this sequence whose sampled token the host has not read."""
        if not self.admitted:
            return 0
        return int(self.slots.most_scheduled[self.slot] - self.slots.produced[self.slot])

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def total_tokens(self) -> int:
        """The prompt and the outputs read since it was admitted, or with which it will be."""
        slots, prompt = self.slots, len(self.request.prompt_ids)
        if self.slot >= 0:
            return prompt + slots.produced.item(self.slot)
        return prompt + slots.kept(self.request)

    @property
    def reusable(self) -> int:
        """How many leading tokens need not run if their KV is cached: never the last one, which
        the next is sampled from; none from where an extra has still to read the prompt; and of the
        outputs none that a penalty counts, because the device counts what it runs."""
        request, params = self.request, self.request.params
        most = self.total_tokens - 1
        if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1:
            most = min(most, self.prompt_len)
        for extra in request.extras:
            if extra.prompt and not extra.complete:
                most = min(most, extra.prompt.start)
        return most

    def keys(self, count: int) -> bytes:
        """What caches know the first `count` tokens by, as the bytes of int32: ids, or of the
        prompt what `Request.prompt_keys` says instead."""
        if self._prompt_keys is None:
            given = self.request.prompt_keys
            packed = self._packed_prompt() if given is None else array("i", given).tobytes()
            self._prompt_keys = packed
        return self._with_outputs(self._prompt_keys, count)

    def share_prompt(self, leader: Sequence) -> None:
        """`leader` has the same prompt and keys: they need not be packed again."""
        self._prompt_bytes, self._prompt_keys = leader._prompt_bytes, leader._prompt_keys

    def drain(self) -> None:
        """Move the tokens kept in the slot into the request's list."""
        if self.admitted:
            self.request.output_ids += self.slots.drain(self.slot, len(self.request.output_ids))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids [stop - start] int32 of positions start..stop-1 of prompt and outputs together,
        not to be written to."""
        known = self._prompt_bytes or self._packed_prompt()
        if 4 * stop > len(known):
            known = self._with_outputs(known, stop)
        return np.frombuffer(known, np.int32, stop - start, 4 * start)

    def _with_outputs(self, prompt: bytes, count: int) -> bytes:
        """The first `count` numbers of `prompt` and the output ids behind it."""
        beyond = count - self.prompt_len
        if beyond <= 0:
            return prompt[: 4 * count]
        self.drain()
        return prompt + array("i", self.request.output_ids[:beyond]).tobytes()

    def _packed_prompt(self) -> bytes:
        if self._prompt_bytes is None:
            self._prompt_bytes = array("i", self.request.prompt_ids).tobytes()
        return self._prompt_bytes
