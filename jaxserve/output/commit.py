"""Device results back to requests: append tokens, decide who is finished, report."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.errors import RequestFailedError
from jaxserve.output.extras import Reported
from jaxserve.output.picked import on_host
from jaxserve.packing.batch import DecodeBatch, ExtendBatch
from jaxserve.packing.sequence import Sequence
from jaxserve.request import Request, Update
from jaxserve.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from jaxserve.step.result import StepResult

logger = logging.getLogger(__name__)
BULK = 32
"""Tokens between updates about a request with bulky extras that does not stream."""
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


def commit(result: StepResult, scheduler: Scheduler, ended: list[Request]) -> int:
    """Read a StepResult (this waits for the device) and hand its tokens out, step by step.

    Requests that ended or were aborted since the step was scheduled, or in an earlier step of the
    same result, are passed over: their extra tokens are dropped. Those that end and have extras to
    be read then are put into `ended`, and their callers not told: `output.ends.Ends` does. Returns
    how many tokens were kept.
    """
    batch = result.batch
    tokens, payloads = result.drawn()
    kept = 0
    if isinstance(batch, DecodeBatch):
        accepted = None if result.accepted is None else np.asarray(result.accepted)
        for step, drawn in enumerate(tokens):
            reported = Reported(payloads, step)
            made = None if accepted is None else accepted > step
            kept += _commit_decode(batch, drawn, made, reported, scheduler, ended)
        if accepted is not None:
            scheduler.settle(batch.rows, batch.steps - accepted)
        return kept
    if batch.wanted.names:
        prompt = {name: on_host(array) for name, array in result.prompt_payloads.items()}
        _read_prompts(batch, Reported(prompt))
    reported = Reported(payloads, 0)
    for row, sequence in batch.sampled:
        if not sequence.request.finished:
            sequence.drain()  # a carried row's earlier tokens may still be in its slot
            kept += _accept(sequence, row, int(tokens[0, row]), reported, scheduler, ended)
    return kept


def _commit_decode(
    batch: DecodeBatch,
    tokens: np.ndarray,
    made: np.ndarray | None,
    reported: Reported,
    scheduler: Scheduler,
    ended: list[Request],
) -> int:
    """Rows that only collect tokens are appended to all at once; the others, and those that end,
    one by one. made [B] bool: which rows have a token; None is all."""
    rows, progress = batch.rows, scheduler.slots
    tokens = tokens[: len(rows.slots)]
    if made is None and rows is scheduler.rows and rows.all_simple:
        settled = progress.append(rows.slots, tokens, rows.limit, rows.stops)
        for row in np.flatnonzero(settled).tolist():
            _settle(rows.sequences[row], row, int(tokens[row]), reported, scheduler, ended)
        return len(tokens)
    alive = progress.epoch[rows.slots] == rows.epochs
    if made is not None:
        alive &= made[: len(alive)]
    which = np.flatnonzero(alive & rows.simple)
    slots, limit, stops = rows.slots[which], rows.limit[which], rows.stops[which]
    settled = progress.append(slots, tokens[which], limit, stops)
    for row in which[settled].tolist():
        _settle(rows.sequences[row], row, int(tokens[row]), reported, scheduler, ended)
    for row in np.flatnonzero(alive & ~rows.simple).tolist():
        _accept(rows.sequences[row], row, int(tokens[row]), reported, scheduler, ended)
    return int(alive.sum())


def _settle(
    sequence: Sequence,
    row: int,
    token: int,
    reported: Reported,
    scheduler: Scheduler,
    ended: list[Request],
) -> None:
    """Move the slot's tokens, of which `token` of row `row` is the last, to the request; finish it
    if that was its end."""
    sequence.drain()
    reason = finish_reason(sequence.request, token)
    if reason is not None:
        for extra in sequence.request.extras:
            extra.read(reported, row)
        finish(sequence.request, reason, scheduler, ended)


def _accept(
    sequence: Sequence,
    row: int,
    token: int,
    reported: Reported,
    scheduler: Scheduler,
    ended: list[Request],
) -> int:
    """Append row `row`'s token to its request; 1 if it was kept."""
    request, progress = sequence.request, scheduler.slots
    if progress.replays and progress.produced[sequence.slot] < len(request.output_ids):
        progress.produced[sequence.slot] += 1  # decoded before it was retracted, and handed out
        return 1
    for extra in request.extras:
        extra.read(reported, row)
    if request.first_token_time is None:
        request.first_token_time = time.perf_counter()
    if request.max_new_tokens == 0:
        request.unemitted_id = token
        finish(request, {"type": "length", "length": 0}, scheduler, ended)
        return 0
    request.output_ids.append(token)
    progress.produced[sequence.slot] += 1
    try:
        reason = finish_reason(request, token)
    except Exception as error:  # of the tokenizer or a pattern: they are this request's alone
        logger.exception("the stops of request %s could not be checked; it fails", request.rid)
        named = isinstance(error, RequestFailedError)
        fail(request, error if named else RequestFailedError.caused_by(error), scheduler)
        return 1
    if reason is not None:
        finish(request, reason, scheduler, ended)
    elif (request.stream_interval or request.extras) and _due(request):
        report(request)
    return 1


def finish_reason(request: Request, token: int) -> dict[str, Any] | None:
    """Why the request ends with `token`, its newest, or None. In the order of
    docs/guide/sampling.md, "Ends"."""
    if request.stop_matcher is not None:
        matched = request.stop_matcher.append(token)
        if matched is not None:
            return {"type": "stop", "matched": matched}
    if token in request.stop_ids:
        return {"type": "stop", "matched": token}
    if len(request.output_ids) >= request.max_new_tokens:
        return {"type": "length", "length": request.max_new_tokens}
    return None


def finish(
    request: Request,
    reason: dict[str, Any],
    scheduler: Scheduler,
    ended: list[Request] | None = None,
) -> None:
    """End a request: its pages are free at once, and its caller hears the rest; but of one with
    extras that are read then, when somebody has read them for those in `ended` (None: nobody
    will)."""
    request.finish_reason = reason
    request.finish_time = time.perf_counter()
    scheduler.finish(request)
    if ended is not None and any(extra.at_end for extra in request.extras):
        ended.append(request)
    else:
        report(request)


def fail(request: Request, error: BaseException, scheduler: Scheduler) -> None:
    """End a request with an exception for its caller."""
    request.finish_reason = failure_reason(error)
    request.finish_time = time.perf_counter()
    scheduler.finish(request)
    request.mailbox.put(Update(request, error=error, finish_reason=request.finish_reason))


def failure_reason(error: BaseException) -> dict[str, Any]:
    """The finish_reason of a request that ended with `error`."""
    return {**ABORTED, "message": str(error), "status_code": 500}


def report(request: Request) -> None:
    """Put what is new since the last report into the caller's mailbox."""
    new_ids = tuple(request.output_ids[request.reported :])
    request.reported = len(request.output_ids)
    request.mailbox.put(
        Update(
            request,
            new_ids,
            extras=tuple([extra.take() for extra in request.extras]),
            unemitted_id=request.unemitted_id,
            finish_reason=request.finish_reason,
        )
    )


def _due(request: Request) -> bool:
    interval, tokens = request.stream_interval, len(request.output_ids)
    if not interval:
        return tokens % BULK == 1 and any(extra.bulky for extra in request.extras)
    return interval == 1 or tokens % interval == 1


def _read_prompts(batch: ExtendBatch, reported: Reported) -> None:
    """Give extras what a step has reported of their prompts, and tell them when all of one has run.
    A prompt that was retracted meanwhile runs again; that of an aborted request may have forks."""
    for row in batch.rows:
        request = row.sequence.request
        if row.sequence.epoch != row.epoch and not request.finished:
            continue
        for number, extra in enumerate(request.extras):
            leader = None
            if row.leader >= 0:
                leader = batch.rows[row.leader].sequence.request.extras[number]
            else:
                extra.read_prompt(reported, row.start, row.stop, row.packed_start)
            if row.samples:
                extra.end_prompt(leader)
