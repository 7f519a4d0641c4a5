"""The logprob arguments of a call."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.api.prompts import NamingRow, per_row
from jaxserve.errors import InvalidRequestError
from jaxserve.output.logprobs import LogprobSpec
from jaxserve.output.raw_logprobs import RawLogprobsSpec

if TYPE_CHECKING:
    from jaxserve.api.extras import Asking
    from jaxserve.config import Limits


def logprob_specs(asking: Asking) -> list[LogprobSpec | None] | None:
    """What logprobs each prompt of a call wants; None if no argument speaks of any."""
    given, prompts = asking.given, asking.prompts
    start, top, ids = given.logprob_start_len, given.top_logprobs_num, given.token_ids_logprob
    if given.return_logprob is False and start is None and top is None and ids is None:
        return None
    nested = isinstance(ids, list | tuple) and any(
        row is None or isinstance(row, list | tuple) for row in ids
    )
    lists = nested and not asking.single
    listed = [
        name
        for name in ("return_logprob", "logprob_start_len", "top_logprobs_num")
        if isinstance(getattr(given, name), list | tuple)
    ] + (["token_ids_logprob"] if lists else [])
    if asking.samples > 1 and listed:
        raise InvalidRequestError(f"{listed[0]} must not be a list of values when n > 1")
    columns = [
        per_row("return_logprob", given.return_logprob, prompts),
        per_row("logprob_start_len", start, prompts),
        per_row("top_logprobs_num", top, prompts),
        per_row("token_ids_logprob", ids, prompts) if lists else [ids] * prompts,
    ]
    specs = []
    for index, row in enumerate(zip(*columns, strict=True)):
        with NamingRow(index, bool(listed) and not asking.single):
            specs.append(logprob_spec(asking.limits, *row))
    return specs


def raw_specs(asking: Asking) -> list[RawLogprobsSpec | None] | None:
    """Which prompts of a call want the logprobs of the model itself; None: none."""
    name, given = "return_raw_logprob", asking.given.return_raw_logprob
    if given is False:
        return None
    flags = [checks.boolean(name, flag or False) for flag in per_row(name, given, asking.prompts)]
    processors = per_row(
        "custom_logit_processor", asking.given.custom_logit_processor, asking.prompts
    )
    for index, pair in enumerate(zip(flags, processors, strict=True)):
        if all(pair):
            with NamingRow(index, not asking.single):
                raise InvalidRequestError(
                    f"{name}=True is not possible with a custom_logit_processor, whose logits take "
                    "the place of the model's"
                )
    return [RawLogprobsSpec() if flag else None for flag in flags]


def logprob_spec(limits: Limits, wanted: Any, start: Any, top: Any, ids: Any) -> LogprobSpec | None:
    """The logprob arguments of one prompt, checked; None if it wants no logprobs."""
    wanted = checks.boolean("return_logprob", False if wanted is None else wanted)
    start = checks.integer("logprob_start_len", -1 if start is None else start, -1)
    top = checks.integer("top_logprobs_num", 0 if top is None else top, 0)
    if top > limits.most_top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs_num must be at most {limits.most_top_logprobs} "
            f"(Engine(max_top_logprobs=...)), got {checks.shown(top)}"
        )
    ids = [] if ids is None else checks.listed(ids)
    if not isinstance(ids, list | tuple):
        raise InvalidRequestError(
            f"token_ids_logprob must be a flat list of integers, got {checks.shown(ids)}"
        )
    if len(ids) > limits.most_logprob_ids:
        raise InvalidRequestError(
            f"token_ids_logprob may have {limits.most_logprob_ids} ids "
            f"(Engine(max_logprob_ids=...)), got {len(ids)}"
        )
    named: list[Any] = [checks.plain(token) for token in ids]
    for token in named:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise InvalidRequestError(
                f"token_ids_logprob must be a flat list of integers, got {checks.shown(ids)}"
            )
        token = int(token)
        if not 0 <= token < limits.vocab_size:
            raise InvalidRequestError(
                f"token_ids_logprob has the out-of-vocabulary id {checks.quoted(token)}; the "
                f"vocabulary has {limits.vocab_size} tokens"
            )
    if not wanted:
        return None
    top = min(top, limits.vocab_size)
    wide = top > limits.max_top_logprobs or len(ids) > limits.max_logprob_ids
    return LogprobSpec(start, top, tuple(map(int, named)), wide)
