"""One size after the other, of what the user asked for, the model has and the machine likes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING

from jaxserve.errors import InvalidRequestError
from jaxserve.options import OPTIONS
from jaxserve.packing.buckets import ALIGNMENT, DECODE_ROWS, Buckets, padded_length
from jaxserve.scheduler.pace import Pace

if TYPE_CHECKING:
    from jaxserve.config.media import MediaSizes
    from jaxserve.machine import Dispatch, Machine
    from jaxserve.models.config import ModelConfig
    from jaxserve.options import Options

INT32_BYTES = 4


def context_length(options: Options, model: ModelConfig) -> int:
    """Tokens. Warns of more than the model claims."""
    context = options.context_length or model.context_length
    if context > model.context_length:
        warnings.warn(
            f"context_length={context} is more than the model's {model.context_length} tokens; "
            "what it writes beyond those may make no sense",
            stacklevel=8,  # of Engine's caller
        )
    return context


def page_size(options: Options, machine: Machine) -> int:
    """Tokens."""
    size = options.page_size or machine.defaults.page_size
    if size % 8:
        raise InvalidRequestError(
            f"page_size must be a multiple of 8 (the kernels' tile), got {size}"
        )
    return size


def decode_ladder(options: Options, machine: Machine) -> tuple[int, ...]:
    """Rows of the decode programs, before it is known how many can run."""
    ladder = tuple(options.cuda_graph_bs or machine.defaults.decode_rows or DECODE_ROWS)
    if options.cuda_graph_max_bs:
        ladder = tuple(b for b in ladder if b <= options.cuda_graph_max_bs)
        ladder += (options.cuda_graph_max_bs,)
    return ladder


def max_rows(options: Options, machine: Machine, page: int) -> int:
    """Requests that run at once, in pages of `page` tokens."""
    rows = options.max_running_requests or _default_rows(options, machine)
    if options.max_total_tokens is not None:
        rows = min(rows, max(options.max_total_tokens // page, 1))
    return rows


def _default_rows(options: Options, machine: Machine) -> int:
    if options.enable_deterministic_inference:
        return machine.defaults.deterministic_rows
    rows = machine.defaults.rows
    return min(rows, max(decode_ladder(options, machine))) if machine.is_gpu else rows


def table_width(machine: Machine, context: int, page: int, rows: int) -> int:
    """Pages that a row can have: of the whole context, or as many as fit."""
    row_bytes = machine.defaults.table_bytes // (rows + 1)
    return min(-(-context // page), max(row_bytes // INT32_BYTES, 1))


def attention(options: Options, machine: Machine) -> str | None:
    """Implementation of attention; None is the device's default order."""
    asked = OPTIONS["attention_backend"].effective(options.attention_backend)
    implementation = asked or (None if machine.is_gpu else "xla")
    if not machine.is_gpu and implementation != "xla":
        raise InvalidRequestError(f"attention_backend={implementation!r} needs a CUDA device")
    return implementation


def chunk_alignment(options: Options, page: int) -> int:
    """Chunks and cached prefixes end at multiples of so many tokens: of deterministic inference
    where tiles of the prefill kernels end, and pages of `page` tokens."""
    if not options.enable_deterministic_inference:
        return 1
    from pallas_kernels import FIXED_TILE  # imports JAX, as the options must not

    return math.lcm(FIXED_TILE, page)


def aligned(tokens: int, alignment: int) -> int:
    """`tokens`, rounded up."""
    return -(-tokens // alignment) * alignment


def chunk(options: Options, machine: Machine) -> int:
    """Tokens of an extend step, before it is known how many there can be."""
    if options.chunked_prefill_size == -1:
        return options.max_prefill_tokens
    if options.chunked_prefill_size is not None:
        return options.chunked_prefill_size
    if options.enable_deterministic_inference:
        return machine.defaults.deterministic_tokens
    return machine.defaults.tokens


def buckets(options: Options, machine: Machine, context: int, rows: int, alignment: int) -> Buckets:
    """The ladder of shapes; one of each kind in deterministic inference."""
    tokens = aligned(min(chunk(options, machine), padded_length(context) * rows), alignment)
    if options.enable_deterministic_inference:
        return Buckets((rows,), (tokens,))
    return Buckets.make(rows, tokens, decode_ladder(options, machine))


def pace(
    options: Options, machine: Machine, model: ModelConfig, media: MediaSizes | None
) -> Pace | None:
    """None where steps do not depend on who else is running: prefill goes first, in whole prompts
    or in chunks that are always the same."""
    if options.chunked_prefill_size == -1 or options.enable_deterministic_inference:
        return None
    tokens = chunk(options, machine)
    found = Pace.of(model, tokens, machine.pacing, options.enable_mixed_chunk)
    if media is None:
        return found
    # room for what has to run together, beside those that ride
    work = max(found.work, padded_length(media.pictures.block) + found.riders * ALIGNMENT)
    return dataclasses.replace(found, work=work, patch=media.pictures.cost)


def steps_per_dispatch(options: Options, machine: Machine, weight_bytes: int) -> int:
    """Decode steps in one program where possible."""
    if options.num_continuous_decode_steps is not None:
        return options.num_continuous_decode_steps
    if machine.dispatch is None or options.enable_deterministic_inference:
        return 1
    _, devices = options.mesh_shape
    return steps_to_stay_busy(weight_bytes, machine.dispatch, devices)


def steps_to_stay_busy(weight_bytes: int, dispatch: Dispatch, devices: int = 1) -> int:
    """Decode steps that `devices` need in one program so as not to wait for the host, at most
    `dispatch.most_steps`: a step takes at least the time to read the weights of each."""
    step_seconds = weight_bytes / dispatch.read_bandwidth
    seconds = dispatch.seconds + (devices - 1) * dispatch.further
    enough = (n for n in range(1, dispatch.most_steps) if n * step_seconds >= seconds)
    return next(enough, dispatch.most_steps)
