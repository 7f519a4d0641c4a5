"""What a single request may ask for."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from jaxserve.config.states import States

if TYPE_CHECKING:
    from jaxserve.config.engine import EngineConfig
    from jaxserve.models.config import ModelConfig


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a single request may ask of the running engine."""

    vocab_size: int
    """V: token ids are less."""
    context_length: int
    """Tokens that the model's context, or the option, allows."""
    max_total_tokens: int
    """Tokens that the pool can hold."""
    logit_bias_capacity: int
    """Biased and masked ids."""
    max_top_logprobs: int
    """Of a token's best logprobs, in the usual programs."""
    max_logprob_ids: int
    """Of named ids' logprobs, in the usual programs."""
    most_top_logprobs: int
    """Of a token's best logprobs, in the wide programs."""
    most_logprob_ids: int
    """Of named ids' logprobs, in the wide programs."""
    hidden_size: int
    """D, numbers of a hidden state."""
    states: States
    """What of the model's inside requests may ask for."""
    max_state_bytes: int
    """Of what a call may ask of that."""
    most_of_a_picture: int
    """Tokens; 0: there are no pictures."""
    most_in_a_block: int
    """Tokens of pictures that see each other and so run in one step; 0: they do not."""
    deterministic: bool
    """Prompts are cut at multiples of a kernel's tile, wherever that is."""

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, pages: int) -> Limits:
        """pages: most that one sequence can have."""
        program = config.program
        return cls(
            model.vocab_size,
            config.context_length,
            pages * program.page_size,
            program.bias_capacity,
            *program.logprob_columns(wide=False),
            *program.logprob_columns(wide=True),
            model.hidden_size,
            config.states,
            config.max_state_bytes,
            0 if config.media is None else config.media.picture,
            0 if config.media is None else config.media.pictures.block,
            program.deterministic,
        )

    @property
    def longest(self) -> int:
        """Tokens of prompt and output together: what the context allows and the pool can hold."""
        return min(self.context_length, self.max_total_tokens)

    def log_cut(self, asked: bool) -> None:
        """Say so where the pool holds less than the context. asked: by max_total_tokens, which is
        no reason to warn."""
        if self.longest < self.context_length:
            logger.log(
                logging.INFO if asked else logging.WARNING,
                "the context of %d tokens is cut to %d: the KV cache holds no more (see "
                "max_total_tokens, context_length)",
                self.context_length,
                self.longest,
            )
