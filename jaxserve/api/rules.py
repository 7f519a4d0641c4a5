"""The checks that need the model: lengths and stops of one prompt."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

from jaxserve import checks
from jaxserve.chains.registry import Names
from jaxserve.chains.use import ChainUse, DrawnLogprobsSpec
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.pattern import StopRegex

if TYPE_CHECKING:
    from jaxserve.config import Limits
    from jaxserve.guides.guide import GuideSpec
    from jaxserve.output.extras import ExtraSpec


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """One prompt of a call, checked: everything its requests share."""

    prompt_ids: list[int]
    """At least one, all in the vocabulary; cut where it was too long and the engine may cut."""
    params: SamplingParams
    """With lengths that fit."""
    max_new_tokens: int
    """Of the output: as asked for, or as many as context and pool have room for."""
    stop_ids: frozenset[int]
    """Tokens that end it."""
    masked_ids: tuple[int, ...]
    """Tokens that may not come before `params.min_new_tokens`, in order."""
    extras: tuple[ExtraSpec, ...]
    """What is wanted beside tokens."""
    stop_regexes: tuple[StopRegex, ...]
    """Compiled, of `params.stop_regex`."""
    chain: ChainUse | None
    """The chain that it asks for."""
    hook: ChainUse | None
    """The hook that it asks for."""
    guides: tuple[GuideSpec, ...]
    """What is to decide about its tokens on the host."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """Facts of the engine that requests are checked against."""

    limits: Limits
    """What one request may ask for."""
    eos_ids: frozenset[int]
    """The model's ends of text."""
    has_tokenizer: bool
    """Without one there is no text to look for stops in."""
    auto_truncate: bool
    """What is too long is cut instead of refused."""
    chains: Names
    """Chains that are registered."""
    hooks: Names
    """Hooks that are registered."""

    def check(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        explicit_length: bool,
        extras: tuple[ExtraSpec, ...],
        guides: tuple[GuideSpec, ...],
    ) -> CheckedPrompt:
        """Checks one prompt. explicit_length: whether the caller gave max_new_tokens. Raises
        InvalidRequestError; warns of what is cut."""
        prompt_ids = self._fit_prompt(prompt_ids)
        for spec in extras:
            spec.check(len(prompt_ids))
        longest = self._fit_output(len(prompt_ids), params, explicit_length)
        if longest != params.max_new_tokens:  # a copy is checked anew
            params = dataclasses.replace(
                params,
                max_new_tokens=longest,
                min_new_tokens=min(params.min_new_tokens, longest),
            )
        stop_ids, masked_ids = self._stop_ids(params)
        chain = self.chains.use(params)
        if chain is not None and chain.chain.reads_logprobs:
            extras = (*extras, DrawnLogprobsSpec())
        return CheckedPrompt(
            prompt_ids=prompt_ids,
            params=params,
            max_new_tokens=longest,
            stop_ids=stop_ids,
            masked_ids=masked_ids,
            extras=extras,
            stop_regexes=self._stop_regexes(params),
            chain=chain,
            hook=self.hooks.use(params),
            guides=guides,
        )

    def _fit_prompt(self, prompt_ids: list[int]) -> list[int]:
        context, size = self.limits.context_length, len(prompt_ids)
        if size >= context:
            message = (
                f"The prompt ({size} tokens) is longer than the model's context length "
                f"({context} tokens)"
            )
            if not self.auto_truncate:
                raise InvalidRequestError(message)
            # One place is left for a generated token.
            warnings.warn(f"{message}; it is cut to {context - 1} tokens", stacklevel=2)
            prompt_ids = prompt_ids[: context - 1]
        return prompt_ids

    def _fit_output(self, size: int, params: SamplingParams, explicit: bool) -> int:
        """The effective max_new_tokens of a prompt of `size` tokens."""
        room = self.limits.context_length - size
        wanted = params.max_new_tokens
        if explicit and wanted is not None and wanted > room and not self.auto_truncate:
            raise InvalidRequestError(
                f"max_new_tokens={checks.quoted(wanted)} and the prompt's {size} tokens exceed "
                f"the model's context length of {self.limits.context_length} tokens"
            )
        wanted = room if wanted is None else min(wanted, room)
        pool = self.limits.max_total_tokens
        if size + min(wanted, 1) > pool:
            raise InvalidRequestError(
                f"The prompt ({size} tokens) can never fit the KV cache, which holds {pool} tokens"
            )
        return min(wanted, pool - size)

    def _stop_ids(self, params: SamplingParams) -> tuple[frozenset[int], tuple[int, ...]]:
        vocabulary = self.limits.vocab_size
        for token in params.logit_bias:
            if token >= vocabulary:
                raise InvalidRequestError(
                    f"logit_bias has the token id {checks.quoted(token)}, which is outside "
                    f"the vocabulary of {vocabulary} tokens"
                )
        # Ids that do not exist in the model can stop nothing: scripts share lists between models.
        ends = frozenset(
            token for token in self.eos_ids | params.stop_token_ids if token < vocabulary
        )
        guided = params.grammar is not None  # and alone knows where its text may end
        goes_on = params.ignore_eos and not guided
        stops = ends & params.stop_token_ids if goes_on else ends
        masked = tuple(sorted(ends)) if params.min_new_tokens and not guided else ()
        biased = len(params.logit_bias) + len(masked)
        if biased > self.limits.logit_bias_capacity:
            raise InvalidRequestError(
                f"logit_bias has {len(params.logit_bias)} entries, with {len(masked)} stop ids "
                f"masked by min_new_tokens; at most {self.limits.logit_bias_capacity} fit "
                "(Engine(logit_bias_capacity=...))"
            )
        return stops, masked

    def _stop_regexes(self, params: SamplingParams) -> tuple[StopRegex, ...]:
        for name, value in (("stop", params.stop), ("stop_regex", params.stop_regex)):
            if value and not self.has_tokenizer:
                raise InvalidRequestError(
                    f"{name}={checks.quoted(list(value))} needs a tokenizer, and "
                    "skip_tokenizer_init=True is set"
                )
        return tuple(StopRegex(pattern) for pattern in params.stop_regex)
