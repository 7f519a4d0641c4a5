"""A request's place in the engine: its slot, its pages, how far it has come. No jax."""

from __future__ import annotations

import dataclasses

from jaxserve.request import Request


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """Progress of one request. Everything "scheduled" counts steps already handed to the device,
    which may be one ahead of the tokens the host has read.

    Invariants, while admitted: slot >= 0; len(pages) * page_size >= kv_len;
    kv_len <= total_tokens + in_flight.
    """

    request: Request
    arrival: int
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    kv_len: int = 0
    """Tokens whose keys and values are scheduled to be in the pages."""
    scheduled_outputs: int = 0
    """Output tokens sampled or scheduled to be sampled."""
    in_flight: int = 0
    """Scheduled steps of this sequence whose sampled token the host has not read."""

    greedy: bool = False
    """Wants nothing of the sampler but the argmax; fixed at construction."""

    def __post_init__(self) -> None:
        p = self.request.params
        neutral = (p.frequency_penalty, p.presence_penalty, p.repetition_penalty) == (0, 0, 1)
        biased = bool(p.logit_bias or self.request.masked_ids)
        self.greedy = p.top_k == 1 and neutral and not biased and self.request.logprobs is None

    @property
    def admitted(self) -> bool:
        return self.slot >= 0

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def total_tokens(self) -> int:
        """Tokens known to the host: the prompt and the committed outputs."""
        return len(self.request.prompt_ids) + len(self.request.output_ids)

    @property
    def fully_scheduled(self) -> bool:
        """No further token needs sampling. A prefill-only request samples once."""
        return self.scheduled_outputs >= max(self.request.max_new_tokens, 1)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start..stop-1 of prompt and outputs together."""
        prompt, split = self.request.prompt_ids, len(self.request.prompt_ids)
        if stop <= split:
            return prompt[start:stop]
        return prompt[start:] + self.request.output_ids[max(start - split, 0) : stop - split]
