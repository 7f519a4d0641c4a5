"""A request's place in the engine: its slot, its pages, how far it has come. No jax."""

from __future__ import annotations

import dataclasses

from jaxserve.request import Request
from jaxserve.scheduler.slots import Slots


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """Progress of one request. Everything "scheduled" counts steps already handed to the device,
    which may be one ahead of the tokens the host has read. The numbers live in `slots` while the
    sequence is admitted, and are those of a fresh start otherwise.

    Invariants, while admitted: slot >= 0; len(pages) * page_size >= kv_len;
    kv_len <= total_tokens + in_flight.
    """

    request: Request
    arrival: int
    slots: Slots
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def admitted(self) -> bool:
        return self.slot >= 0

    @property
    def kv_len(self) -> int:
        """Tokens whose keys and values are scheduled to be in the pages."""
        return int(self.slots.kv_len[self.slot]) if self.admitted else 0

    @kv_len.setter
    def kv_len(self, tokens: int) -> None:
        self.slots.kv_len[self.slot] = tokens

    @property
    def in_flight(self) -> int:
        """Scheduled steps of this sequence whose sampled token the host has not read."""
        if not self.admitted:
            return 0
        return int(self.slots.scheduled[self.slot] - self.slots.produced[self.slot])

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def total_tokens(self) -> int:
        """Tokens known to the host: the prompt and the committed outputs."""
        outputs = self.slots.produced[self.slot] if self.admitted else len(self.request.output_ids)
        return len(self.request.prompt_ids) + int(outputs)

    def drain(self) -> None:
        """Move the tokens kept in the slot into the request's list."""
        if self.admitted:
            self.request.output_ids += self.slots.drain(self.slot, len(self.request.output_ids))

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start..stop-1 of prompt and outputs together."""
        self.drain()
        prompt, split = self.request.prompt_ids, len(self.request.prompt_ids)
        if stop <= split:
            return prompt[start:stop]
        return prompt[start:] + self.request.output_ids[max(start - split, 0) : stop - split]
