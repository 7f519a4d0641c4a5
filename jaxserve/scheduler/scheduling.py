"""How an engine schedules: what stays the same while it runs. No jax."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxserve.packing.buckets import Buckets
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.policy import Policy

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduling:
    """The sizes and rules of a Scheduler."""

    buckets: Buckets
    """Sizes that steps are padded to."""
    page_size: int
    """S."""
    max_rows: int
    """R: sequences that are admitted at once."""
    max_prefill_tokens: int
    """Of one extend step, if its bucket does not say less."""
    max_prefill_rows: int | None = None
    """Sequences with tokens to run in one extend step; None is no limit but the bucket's."""
    steps_per_dispatch: int = 1
    """Decode steps scheduled at once where possible, at most S."""
    policy: Policy = dataclasses.field(default_factory=Policy)
    """Who goes first."""
    eviction: str | None = "lru"
    """The prefix cache's policy; None is no prefix cache."""
    pace: Pace | None = None
    """None lets prefill go first, whatever runs."""
    chunk_alignment: int = 1
    """Chunks of a prompt and its cached prefix end at multiples of it, but for the prompt's end."""
    replays: bool = False
    """A retracted sequence decodes its outputs again, and only prompts are cached, because what an
    extend step computes for an output is not bitwise what a decode step does."""
    media_rows: int = 0
    """Tokens' rows of pictures that the device has room for; 0: the model takes no pictures."""
    pending: int = 1024
    """Outputs that a slot keeps before they move into its request's list."""

    @property
    def extend_tokens(self) -> int:
        """Packed tokens of one extend step at most."""
        return min(self.max_prefill_tokens, self.buckets.max_tokens)

    @classmethod
    def of(cls, config: EngineConfig) -> Scheduling:
        """An engine's."""
        return cls(
            buckets=config.buckets,
            page_size=config.program.page_size,
            max_rows=config.program.max_rows,
            max_prefill_tokens=config.max_prefill_tokens,
            max_prefill_rows=config.max_prefill_rows,
            steps_per_dispatch=config.program.steps_per_dispatch,
            policy=config.policy,
            eviction=config.radix_eviction,
            pace=config.pace,
            chunk_alignment=config.chunk_alignment,
            replays=config.program.deterministic,
            media_rows=0 if config.media is None else config.media.rows,
        )
