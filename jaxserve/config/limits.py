"""What a single request may ask for."""

from __future__ import annotations

import dataclasses
import logging

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
