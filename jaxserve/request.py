"""One sequence to generate, and what the engine thread tells the caller about it."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.mailbox import Mailbox
    from jaxserve.sampling_params import SamplingParams
    from jaxserve.text.stop import StopMatcher

TopLogprobs = list[tuple[float, int]] | None
"""One position's (logprob, token id) pairs, best first; None where no predecessor exists."""


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobSpec:
    """What logprobs a request wants.

    start: first prompt position whose logprob is reported; -1 is output tokens only.
    top: how many of the best tokens are reported at each position.
    ids: token ids whose logprobs are reported at each position.
    wide: more of one of them than the usual programs have columns for, see `config.WIDE_TOP`.
    """

    start: int = -1
    top: int = 0
    ids: tuple[int, ...] = ()
    wide: bool = False


@dataclasses.dataclass(slots=True)
class Logprobs:
    """Logprobs of consecutive positions. The three lists are empty when not asked for,
    otherwise as long as `token`. None stands where there is no predecessor to predict from."""

    token: list[float | None] = dataclasses.field(default_factory=list)
    top: list[TopLogprobs] = dataclasses.field(default_factory=list)
    ids: list[TopLogprobs] = dataclasses.field(default_factory=list)

    def extend(self, other: Logprobs) -> None:
        self.token += other.token
        self.top += other.top
        self.ids += other.ids

    def clear(self) -> None:
        self.token.clear()
        self.top.clear()
        self.ids.clear()


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """News about one request, put into its call's mailbox by the engine thread.

    new_ids: tokens since the previous update. output_logprobs: of those tokens.
    input_logprobs: complete, with the first update that has them.
    unemitted_id: the token a prefill-only request (max_new_tokens 0) would have gone on with; its
    logprobs are the single entry of output_logprobs.
    finish_reason: None while running, then the dict of docs/api/results.md.
    error: set instead of everything else when the engine died.
    """

    request: Request
    new_ids: tuple[int, ...] = ()
    output_logprobs: Logprobs | None = None
    input_logprobs: Logprobs | None = None
    unemitted_id: int | None = None
    finish_reason: dict[str, Any] | None = None
    error: BaseException | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One sequence to generate: what its caller asked for, and how far it has come.

    What was asked for is written before `Core.submit`, and by nobody afterwards. The engine thread
    writes the rest. Of it the caller's thread reads what says so below, and only after it has taken
    the update that is named there out of the mailbox: the field was written before that update was
    put, and the mailbox's lock lies between. Everything else is the engine thread's alone.
    """

    rid: str
    """Of this sequence; no other one in flight has it."""
    index: int
    """Place in the call's result list: prompt number * n + sample index."""
    prompt_ids: list[int]
    """At least one, all in the vocabulary. Samples of one prompt share the list."""
    params: SamplingParams
    """With lengths that fit the context."""
    max_new_tokens: int
    """Effective limit after clipping to the context."""
    stop_ids: frozenset[int]
    """Tokens that end the request: EOS (unless ignore_eos) and the caller's stop_token_ids."""
    masked_ids: tuple[int, ...]
    """Tokens that may not be sampled before `params.min_new_tokens`."""
    seed: int
    """In [0, 2**32); the same for all samples of a prompt."""
    sample_index: int
    """0 to n-1 among the samples of its prompt."""
    mailbox: Mailbox
    """Of its call; the engine thread puts, the caller takes."""
    group: str = ""
    """Samples of one prompt share a group name and prefill once; "" is no group."""
    priority: int | None = None
    """None: the engine's default."""
    cache_salt: str = ""
    """Only requests with the same salt share cached prefixes."""
    logprobs: LogprobSpec | None = None
    stream_interval: int = 0
    """Tokens between updates; 0 puts one update, at the end."""
    stop_matcher: StopMatcher | None = None
    """When stop strings or regexes were given. The engine thread feeds it; the caller reads where
    the match lies after the last update, and the strings and regexes at any time."""
    created: float = dataclasses.field(default_factory=time.perf_counter)
    """When the call began, before its prompts were tokenized. This and the other times are
    readings of time.perf_counter()."""
    submitted_time: float | None = None
    """When it was put into the engine's queue: `Core.submit` writes it, on the caller's thread,
    before the engine thread knows of the request."""

    output_ids: list[int] = dataclasses.field(default_factory=list)
    """Without those that a slot still keeps. (The caller has what its updates brought.)"""
    reported: int = 0
    """Output tokens already put into the mailbox."""
    pending_logprobs: Logprobs = dataclasses.field(default_factory=Logprobs)
    pending_input_logprobs: Logprobs = dataclasses.field(default_factory=Logprobs)
    """Of the prompt chunks read so far; becomes `input_logprobs` when the prompt is complete."""
    input_logprobs: Logprobs | None = None
    finish_reason: dict[str, Any] | None = None
    """None until it ends, see docs/api/results.md. (The caller has the last update's.)"""
    cached_tokens: int = 0
    """Prompt tokens that did not run because their KV was there, in whole pages. Written once, when
    it is first admitted; the caller reads it after any update."""
    cached_host_tokens: int | None = None
    """Those of them whose KV came from host memory; None without a host tier. Written and read as
    `cached_tokens`."""
    num_retractions: int = 0
    """How often its pages were taken back. Grows until it ends. The caller reads it after any
    update, and may see it ahead of that update's tokens; it is final with the last one."""
    unemitted_id: int | None = None
    """The token that a prefill-only request would have gone on with; the last update has it."""
    admitted_time: float | None = None
    """When it first had a slot; None if it never had. The caller reads it after the last update."""
    first_token_time: float | None = None
    """When its first token was read; None if none was. Read as `admitted_time`."""
    finish_time: float | None = None
    """When it ended. Written before the last update, after which the caller reads it."""

    @property
    def seed_bits(self) -> int:
        """The seed's 32 bits as an int32."""
        return self.seed - (self.seed >> 31 << 32)

    @property
    def num_bias(self) -> int:
        """Entries of its list of biases: the caller's and those that mask."""
        return len(self.params.logit_bias or ()) + len(self.masked_ids)

    @property
    def wants_logprob(self) -> bool:
        """Whether any logprob of its tokens is reported."""
        return self.logprobs is not None

    @property
    def num_top(self) -> int:
        """Of the best tokens at each position."""
        return self.logprobs.top if self.logprobs is not None else 0

    @property
    def num_named(self) -> int:
        """Of named tokens at each position."""
        return len(self.logprobs.ids) if self.logprobs is not None else 0

    @property
    def finished(self) -> bool:
        """Whether it has ended, as the engine thread sees it."""
        return self.finish_reason is not None

    def count_retraction(self) -> None:
        """It leaves the device with its tokens, and will run again from the first one."""
        self.num_retractions += 1
        if self.input_logprobs is None:
            self.pending_input_logprobs.clear()
