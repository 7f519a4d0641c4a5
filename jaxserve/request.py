"""One sequence to generate, and what the engine thread tells the caller about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.mailbox import Mailbox
    from jaxserve.output.extras import Extra, News
    from jaxserve.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """News about one request, put into its call's mailbox by the engine thread."""

    request: Request
    new_ids: tuple[int, ...] = ()
    """Tokens since the previous update."""
    extras: tuple[News, ...] = ()
    """What is new of each of the request's extras."""
    unemitted_id: int | None = None
    """The token that a prefill-only request (max_new_tokens 0) would have gone on with; what its
    extras say of outputs is about this one."""
    finish_reason: dict[str, Any] | None = None
    """None while running, then the dict of docs/api/results.md."""
    error: BaseException | None = None
    """Set instead of everything else when the engine died."""


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One sequence: what the caller asked for (set once) and its progress (engine thread only).

    `prompt_ids` is never empty and lies inside the vocabulary: callers are checked before.
    """

    rid: str
    index: int
    """Place in the call's result list: prompt number * n + sample index."""
    prompt_ids: list[int]
    params: SamplingParams
    max_new_tokens: int
    """Effective limit after clipping to the context."""
    stop_ids: frozenset[int]
    """Tokens that end the request: EOS (unless ignore_eos) and the caller's stop_token_ids."""
    masked_ids: tuple[int, ...]
    """Tokens that may not be sampled before `params.min_new_tokens`."""
    seed: int
    """In [0, 2**32); the same for all samples of a prompt."""
    sample_index: int
    mailbox: Mailbox
    group: str = ""
    """Samples of one prompt share a group name and prefill once; "" is no group."""
    priority: int | None = None
    """None: the engine's default."""
    namespace: str = ""
    """Only requests of the same one share cached prefixes: see `cache.keys.namespace_of`."""
    prompt_keys: list[int] | None = None
    """An int32 for each prompt token, by which caches know it; None: the token ids. Where something
    else stands in a token's place (a placeholder's picture), its key must tell that apart, by bits
    of a hash: a page's keys together are what keeps two pages apart."""
    extras: tuple[Extra[Any], ...] = ()
    """What it wants beside tokens, and what of that has come: see output.extras."""
    stream_interval: int = 0
    """Tokens between updates; 0 puts one update, at the end."""
    stop_matcher: Any = None
    """text.stop.StopMatcher when stop strings or regexes were given, else None."""
    created: float = dataclasses.field(default_factory=time.perf_counter)
    """When the call began, before its prompts were tokenized. This and the other times are
    readings of time.perf_counter()."""
    submitted_time: float | None = None
    """When it was put into the engine's queue."""

    output_ids: list[int] = dataclasses.field(default_factory=list)
    reported: int = 0
    """Output tokens already put into the mailbox."""
    finish_reason: dict[str, Any] | None = None
    cached_tokens: int = 0
    """Prompt tokens that did not run because their KV was there, in whole pages."""
    cached_host_tokens: int | None = None
    """Those of them whose KV came from host memory; None without a host tier."""
    num_retractions: int = 0
    unemitted_id: int | None = None
    admitted_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None

    @property
    def seed_bits(self) -> int:
        """The seed's 32 bits as an int32."""
        return self.seed - (self.seed >> 31 << 32)

    @property
    def num_bias(self) -> int:
        """Entries of its list of biases: the caller's and those that mask."""
        return len(self.params.logit_bias or ()) + len(self.masked_ids)

    @property
    def named_ids(self) -> Sequence[int]:
        """Token ids that its row on the device looks at."""
        return next((extra.ids for extra in self.extras if extra.ids), ())

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def count_retraction(self) -> None:
        """It leaves the device with its tokens, and will run again from the first one."""
        self.num_retractions += 1
        for extra in self.extras:
            extra.restart()
