"""One sequence to generate, and what the engine thread tells the caller about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.chains.use import ChainUse
    from jaxserve.guides.guide import Guide
    from jaxserve.mailbox import Mailbox
    from jaxserve.media.picture import PromptMedia
    from jaxserve.output.extras import Extra, News
    from jaxserve.sampling_params import SamplingParams
    from jaxserve.text.stop import StopMatcher


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
    namespace: str = ""
    """Only requests of the same one share cached prefixes: see `cache.keys.namespace_of`."""
    prompt_keys: list[int] | None = None
    """An int32 for each prompt token, by which caches know it; None: the token ids. Where something
    else stands in a token's place (a placeholder's picture), its key must tell that apart, by bits
    of a hash: a page's keys together are what keeps two pages apart."""
    media: PromptMedia | None = None
    """The pictures of its prompt; None: there are none."""
    extras: tuple[Extra[Any], ...] = ()
    """What it wants beside tokens, and what of that has come: see output.extras."""
    chain: ChainUse | None = None
    """The registered chain that its tokens are drawn with; None: the sampler alone."""
    hook: ChainUse | None = None
    """The registered hook that the model has for its tokens; None: the model as it is."""
    guides: tuple[Guide, ...] = ()
    """What decides on the host about its tokens, in this order."""
    stream_interval: int = 0
    """Tokens between updates; 0 puts one update, at the end."""
    stop_matcher: StopMatcher | None = None
    """When stop strings or regexes were given. The engine thread feeds it; the caller reads where
    the match lies after the last update, and the strings and regexes at any time."""
    routed_dp_rank: int | None = None
    """The replica that it is to run on; None: any."""
    created: float = dataclasses.field(default_factory=time.perf_counter)
    """When the call began, before its prompts were tokenized. This and the other times are
    readings of time.perf_counter()."""
    submitted_time: float | None = None
    """When it was put into the engine's queue: `Core.submit` writes it, on the caller's thread,
    before the engine thread knows of the request."""

    dp_rank: int | None = None
    """The replica that it runs on; None where there is one only. `Core.submit` writes it before the
    engine thread knows of the request, and once more when that replica has failed and another goes
    on with it. The caller reads it after any update."""
    output_ids: list[int] = dataclasses.field(default_factory=list)
    """Without those that a slot still keeps. (The caller has what its updates brought.)"""
    reported: int = 0
    """Output tokens already put into the mailbox."""
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
    def apart(self) -> bool:
        """Whether its tokens are drawn by programs of their own, behind the model's."""
        return self.chain is not None or self.hook is not None or bool(self.guides)

    @property
    def seed_bits(self) -> int:
        """The seed's 32 bits as an int32."""
        return self.seed - (self.seed >> 31 << 32)

    @property
    def position_delta(self) -> int:
        """What is added to a generated token's place, to rotate it by."""
        return 0 if self.media is None else self.media.delta

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
        """Whether it has ended, as the engine thread sees it."""
        return self.finish_reason is not None

    def count_retraction(self) -> None:
        """It leaves the device with its tokens, and will run again from the first one."""
        self.num_retractions += 1
        for extra in self.extras:
            extra.restart()
