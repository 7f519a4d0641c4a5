"""What a compiled program depends on, beside the model and the shapes of its arguments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.machine import Crossovers

WIDE_TOP, WIDE_IDS = 1024, 4096
"""Columns of the best logprobs and of named ids in the programs for requests that want more than
max_top_logprobs or max_logprob_ids. They are compiled when first wanted: in every program these
columns would be copied in each step that reports logprobs, and of each prompt token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    """Exactly what changes a program: its repr is part of the name that a stored program has, and
    whatever makes programs reads nothing else of an EngineConfig (tests/test_program_config.py)."""

    platform: str
    """As JAX calls it: "cpu", "gpu"."""
    crossovers: Crossovers
    """Where the device computes one way rather than another."""
    page_size: int
    """S, tokens."""
    table_width: int
    """W: pages that a row can have. A runner's tables are no wider than its pool."""
    max_rows: int
    """R: requests that run at once."""
    steps_per_dispatch: int
    """Decode steps in one program where possible, 1 to 8 and so never more than S. With more than
    one, each row bucket has two decode programs: of one step and of these."""
    deterministic: bool
    """A request's numbers depend on nothing but itself: one bucket of each kind, tiles that start
    where they always do, algorithms that no clock chooses."""
    attention: str | None
    """Implementation of attention; None is the device's default order."""
    kv_cache_dtype: str
    """Of the KV pages, as the option of that name says it."""
    bias_capacity: int
    """C: biased and masked ids of a request."""
    max_logprob_ids: int
    """I: columns of named ids' logprobs; a request that wants more needs the wide programs."""
    max_top_logprobs: int
    """Columns of the best logprobs; likewise."""
    raw_logprobs: bool
    """Output logprobs are those before temperature."""

    @property
    def other_kernels(self) -> str | None:
        """Implementation of everything else: XLA's where attention is, or the default."""
        return "xla" if self.attention == "xla" else None

    def logprob_columns(self, wide: bool) -> tuple[int, int]:
        """Of the best logprobs and of named ids, in the usual programs or in those for more."""
        if not wide:
            return self.max_top_logprobs, self.max_logprob_ids
        return max(self.max_top_logprobs, WIDE_TOP), max(self.max_logprob_ids, WIDE_IDS)
