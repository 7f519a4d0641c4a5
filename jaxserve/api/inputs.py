"""From a call's arguments to requests. All rows are checked before any request exists."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from jaxserve import checks
from jaxserve.api.arguments import Arguments
from jaxserve.api.extras import Asking, extra_specs
from jaxserve.api.grammars import may_wait
from jaxserve.api.guides import guide_specs
from jaxserve.api.prompts import (
    NamingRow,
    Prompts,
    cache_salts,
    check_count,
    per_row,
    request_ids,
)
from jaxserve.api.reading import PromptReader
from jaxserve.api.rules import CheckedPrompt, Rules
from jaxserve.api.states import check_bytes
from jaxserve.cache.keys import namespace_of
from jaxserve.chains.registry import Names
from jaxserve.errors import InvalidRequestError
from jaxserve.grammars.grammars import Grammars
from jaxserve.mailbox import Mailbox
from jaxserve.request import Request
from jaxserve.sampling_params import DEFAULT_MAX_NEW_TOKENS, SamplingParams
from jaxserve.server_args import ServerArgs
from jaxserve.text.codec import Codec
from jaxserve.text.stop import StopMatcher
from jaxserve.text.transcript import Transcript

if TYPE_CHECKING:
    from jaxserve.config import Limits

T = TypeVar("T")
SEEDS = 1 << 32
"""Request seeds lie in [0, SEEDS); a larger or negative sampling_seed is taken modulo this."""
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
        prompts: PromptReader,
        chains: Names,
        hooks: Names,
    ) -> None:
        """codec: None with skip_tokenizer_init. chains, hooks: what is registered. Raises, with
        `grammar_backend="llguidance"`, as `Grammars`."""
        self._args = args
        self._limits = limits
        self._codec = codec
        self._prompts = prompts
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
            chains=chains,
            hooks=hooks,
        )
        self._grammars = Grammars(args, codec, limits.vocab_size, eos_ids)
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
        read = self._prompts.read(prompts, given.image_data)
        ids, media = [ids for ids, _ in read], [media for _, media in read]
        asking = Asking(
            given, len(ids), single, samples, self._limits, params, self._args, self._grammars
        )
        extras, guides = extra_specs(asking), guide_specs(asking)
        rids = request_ids(given.rid, len(ids), single, samples)
        priority, rank = self._priority(given.priority), self._rank(given)
        salts = cache_salts(given.cache_salt, len(ids))
        rows = []
        for index, values in enumerate(zip(ids, params, explicit, extras, guides, strict=True)):
            with NamingRow(index, not single):
                rows.append(self._rules.check(*values))
        if any(extras):
            check_bytes(self._limits, rows, samples)
        mailbox = Mailbox()
        requests: list[Request] = []
        for index, (row, names) in enumerate(zip(rows, rids, strict=True)):
            hook = "" if row.hook is None else row.hook.digest
            namespace = namespace_of(salt=salts[index], hook=hook)
            shared = {"priority": priority, "namespace": namespace, "created": created}
            shared["routed_dp_rank"] = rank
            if (shown := media[index]) is not None:
                shared |= {"media": shown, "prompt_keys": shown.keys.tolist()}
            requests += self._samples(row, names, index, mailbox, given.stream, shared)
        return Inputs(requests, mailbox, single and samples == 1)

    async def off_the_loop(self, begin: Callable[[Arguments], T], given: Arguments) -> T:
        """`begin(given)`, which builds, on another thread where it may take long."""
        compiles = given.custom_logit_processor is not None  # programs, when it is the first
        loads = not checks.absent(given.image_data)
        if compiles or loads or may_wait(given.sampling_params, self._preferred):
            return await asyncio.to_thread(begin, given)
        return begin(given)

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
        requests = [
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
                chain=row.chain,
                hook=row.hook,
                stream_interval=interval,
                stop_matcher=self._stop_matcher(row),
                **shared,
            )
            for sample, name in enumerate(names)
        ]
        for request in requests if row.guides else ():
            request.guides = tuple([spec.guide(request) for spec in row.guides])
        return requests

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
