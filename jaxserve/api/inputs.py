"""From a call's arguments to requests. All rows are checked before any request exists."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve import checks
from jaxserve.api.arguments import Arguments
from jaxserve.api.extras import Asking, extra_specs
from jaxserve.api.prompts import (
    NamingRow,
    Prompts,
    cache_salts,
    check_count,
    check_prompts,
    per_row,
    request_ids,
    token_ids,
)
from jaxserve.api.rules import CheckedPrompt, Rules
from jaxserve.cache.keys import namespace_of
from jaxserve.errors import InvalidRequestError
from jaxserve.mailbox import Mailbox
from jaxserve.request import Request
from jaxserve.sampling_params import DEFAULT_MAX_NEW_TOKENS, SamplingParams
from jaxserve.server_args import ServerArgs
from jaxserve.text import chat
from jaxserve.text.chat import ChatPrompts
from jaxserve.text.codec import Codec
from jaxserve.text.stop import StopMatcher
from jaxserve.text.transcript import Transcript

if TYPE_CHECKING:
    from jaxserve.config import Limits

SEEDS = 1 << 32
"""Request seeds lie in [0, SEEDS); a larger or negative sampling_seed is taken modulo this."""
SHORT_TOKEN = 8
"""Bytes that the longest token of any vocabulary has: shorter texts need no look at it."""
SEEDS_AT_ONCE = 256
"""Drawn together: numpy's generator is slow to wake for a single one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """The requests of one call."""

    requests: list[Request]
    """In the order of the results: prompt by prompt, the n samples of one side by side."""
    mailbox: Mailbox
    """Of all of them."""
    single: bool
    """One prompt and n=1, so the result is a dict."""


class RequestBuilder:
    """Makes the requests of calls to one engine. Thread-safe."""

    def __init__(
        self,
        args: ServerArgs,
        limits: Limits,
        eos_ids: frozenset[int],
        codec: Codec | None,
        chats: ChatPrompts | None,
    ) -> None:
        """codec, chats: None with skip_tokenizer_init."""
        self._limits = limits
        self._codec = codec
        self._chats = chats
        self._stream_interval = args.stream_interval
        self._preferred = args.preferred_params
        self._refuse_priority = (
            args.abort_on_priority_when_disabled and not args.enable_priority_scheduling
        )
        # With priorities the worst of the queue fail instead, when the others are in it.
        self._replicas, _ = args.mesh_shape
        most = None if args.enable_priority_scheduling else args.max_queued_requests
        self._most_queued = None if most is None else most * self._replicas
        self._rules = Rules(
            limits=limits,
            eos_ids=eos_ids,
            has_tokenizer=codec is not None,
            auto_truncate=args.allow_auto_truncate,
        )
        self._seeds = np.random.default_rng(args.random_seed)
        self._drawn: list[int] = []
        # Of the generator alone. A signal handler may draw while its own thread does.
        self._lock = threading.RLock()

    def build(self, given: Arguments) -> Inputs:
        """The requests of a call, in result order. Raises InvalidRequestError (for a batch, naming
        the row), NotSupportedError and UnknownOptionError; nothing has happened then."""
        created = time.perf_counter()
        prompts = Prompts.of(given.prompt, given.input_ids)
        single, count = prompts.single, prompts.count
        params, explicit = self._sampling_params(given.sampling_params, count)
        samples = params[0].n if params else 1
        for index, row in enumerate(params):
            if row.n != samples:
                raise InvalidRequestError(
                    "parallel_sample_num should be the same for all prompts of a batch, got "
                    f"n={samples} in row 0 and n={row.n} in row {index}"
                )
        check_count(count, samples, self._most_queued)
        ids = self._prompt_ids(prompts)
        extras = extra_specs(Asking(given, len(ids), single, samples, self._limits))
        rids = request_ids(given.rid, len(ids), single, samples)
        priority, rank = self._priority(given.priority), self._rank(given)
        salts = cache_salts(given.cache_salt, len(ids))
        rows = []
        for index, values in enumerate(zip(ids, params, explicit, extras, strict=True)):
            with NamingRow(index, not single):
                rows.append(self._rules.check(*values))
        mailbox = Mailbox()
        requests: list[Request] = []
        for index, (row, names) in enumerate(zip(rows, rids, strict=True)):
            namespace = namespace_of(salt=salts[index])
            shared = {"priority": priority, "namespace": namespace, "created": created}
            shared["routed_dp_rank"] = rank
            requests += self._samples(row, names, index, mailbox, given.stream, shared)
        return Inputs(requests, mailbox, single and samples == 1)

    def render_chat(
        self, messages: Any, tools: Sequence[Any] | None, template_kwargs: Mapping[str, Any] | None
    ) -> list[int] | list[list[int]]:
        """Prompt token ids of a conversation, or of each of a list of them."""
        conversations = messages if chat.is_batch(messages) else [messages]
        if self._chats is None:
            raise InvalidRequestError(
                "messages need a tokenizer, and skip_tokenizer_init=True is set"
            )
        texts = []
        for index, conversation in enumerate(conversations):
            with NamingRow(index, conversations is messages):
                texts.append(
                    self._chats.render(conversation, tools=tools, template_kwargs=template_kwargs)
                )
        # The template writes the special tokens itself, the first one included.
        rows = self._encode("messages", texts, add_special_tokens=False)
        return rows if conversations is messages else rows[0]

    def _encode(
        self, name: str, texts: list[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text. Those that must be too long, by their bytes, are refused first:
        encoding takes a second for each megabyte or two. (What is cut is encoded: where a text is
        cut decides its last tokens.)"""
        codec, context = self._codec, self._limits.context_length
        if codec is None:
            raise InvalidRequestError(
                f"{name} needs a tokenizer, and skip_tokenizer_init=True is set: give input_ids"
            )
        for index, text in enumerate(texts):
            if len(text) < SHORT_TOKEN * context or self._rules.auto_truncate:
                continue
            least = codec.least_tokens(text)
            if least >= context:
                with NamingRow(index, len(texts) > 1):
                    raise InvalidRequestError(
                        f"The {name} ({len(text)} characters, at least {least} tokens) is longer "
                        f"than the model's context length ({context} tokens)"
                    )
        return codec.encode(name, texts, add_special_tokens=add_special_tokens)

    def _prompt_ids(self, given: Prompts) -> list[list[int]]:
        if given.ids is not None:
            name = "input_ids" if given.single else "input_ids[{}]"
            size = self._limits.vocab_size
            return [token_ids(name.format(index), row, size) for index, row in enumerate(given.ids)]
        prompts = list(given.texts or ())
        check_prompts(prompts)
        if not prompts:
            return []
        encoded = self._encode("prompt", prompts)
        size = self._limits.vocab_size
        for prompt, row in zip(prompts, encoded, strict=True):
            # (Those of a tokenizer are integers; arrays of millions would hold others up.)
            if not row or max(row) >= size:
                token_ids(f"the tokens of prompt {checks.shown(prompt)}", row, size)
        return encoded

    def _sampling_params(self, given: Any, prompts: int) -> tuple[list[SamplingParams], list[bool]]:
        """Each prompt's parameters, and whether they say max_new_tokens themselves."""
        rows = per_row("sampling_params", given, prompts)
        params, explicit = [], []
        previous: Any = self
        for index, row in enumerate(rows):
            # A dict shared by all prompts is checked once.
            if row is not previous:
                with NamingRow(index, isinstance(given, list | tuple)):
                    parsed = SamplingParams.from_dict(row, self._preferred)
                previous = row
            params.append(parsed)
            if isinstance(row, SamplingParams):
                explicit.append(row.max_new_tokens != DEFAULT_MAX_NEW_TOKENS)
            else:
                explicit.append(bool(row) and "max_new_tokens" in row)
        return params, explicit

    def _priority(self, given: Any) -> int | None:
        if given is None:
            return None
        if self._refuse_priority:
            raise InvalidRequestError(
                f"priority={checks.quoted(given)} needs Engine(enable_priority_scheduling=True); "
                "abort_on_priority_when_disabled=True is set"
            )
        return checks.integer("priority", given)

    def _rank(self, given: Arguments) -> int | None:
        """The replica that a call asks for."""
        last = self._replicas - 1
        ranks = {
            name: checks.integer(name, value, 0, last)
            for name in ("routed_dp_rank", "data_parallel_rank")
            if (value := getattr(given, name)) is not None
        }
        if len(set(ranks.values())) > 1:
            said = " and ".join(f"{name}={rank}" for name, rank in ranks.items())
            raise InvalidRequestError(f"{said} are the same argument")
        return next(iter(ranks.values()), None)

    def _samples(
        self,
        row: CheckedPrompt,
        names: list[str],
        prompt: int,
        mailbox: Mailbox,
        stream: bool,
        shared: Mapping[str, Any],
    ) -> list[Request]:
        """The n requests of one prompt: the same seed, different sample indices. shared: further
        fields of all of them."""
        seed = row.params.sampling_seed
        if seed is None:
            seed = self._draw_seed()
        interval = (row.params.stream_interval or self._stream_interval) if stream else 0
        return [
            Request(
                rid=name,
                index=prompt * len(names) + sample,
                prompt_ids=row.prompt_ids,
                params=row.params,
                max_new_tokens=row.max_new_tokens,
                stop_ids=row.stop_ids,
                masked_ids=row.masked_ids,
                seed=seed % SEEDS,
                sample_index=sample,
                mailbox=mailbox,
                group=names[0] if len(names) > 1 else "",
                extras=tuple([spec.extra(len(row.prompt_ids)) for spec in row.extras]),
                stream_interval=interval,
                stop_matcher=self._stop_matcher(row),
                **shared,
            )
            for sample, name in enumerate(names)
        ]

    def _draw_seed(self) -> int:
        while True:
            try:
                return self._drawn.pop()
            except IndexError:
                with self._lock:
                    if not self._drawn:
                        drawn = self._seeds.integers(SEEDS, size=SEEDS_AT_ONCE).tolist()
                        self._drawn.extend(reversed(drawn))

    def _stop_matcher(self, row: CheckedPrompt) -> StopMatcher | None:
        params = row.params
        if self._codec is None or not (params.stop or row.stop_regexes):
            return None
        transcript = Transcript(
            self._codec,
            row.prompt_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        return StopMatcher(params.stop, row.stop_regexes, transcript)
