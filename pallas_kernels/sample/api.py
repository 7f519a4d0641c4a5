"""sample: the public function, its argument types and its default orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only

# of JAX, or of NumPy; inside kernels a reference to one
Array = Any


class SampleRows(NamedTuple):
    """What each row wants, all [B]; floats float32, the others int32.

    temperature > 0; top_p in (0, 1], 1 for all; min_p in [0, 1]; frequency, presence and repetition
    (> 0) penalties, neutral at 0, 0, 1. top_k >= 1: 1 is greedy, any number from V on is all.
    seed: the bits of a uint32. sample_index: which of several samples of a prompt. position: of the
    token drawn now. num_bias, num_top, num_named: entries of the row's lists that count.
    wants_logprob: 0 leaves all logprobs of the row unspecified. slot: the row of SlotLists' arrays,
    in range. live: 0 for padding.
    """

    temperature: Array
    top_p: Array
    min_p: Array
    frequency: Array
    presence: Array
    repetition: Array
    top_k: Array
    seed: Array
    sample_index: Array
    position: Array
    num_bias: Array
    num_top: Array
    num_named: Array
    wants_logprob: Array
    slot: Array
    live: Array


FLOATS = SampleRows._fields[:6]


class SlotLists(NamedTuple):
    """What belongs to slots; rows pick theirs with SampleRows.slot.

    counts [R, V] int32: how often each token was generated; read only for rows with a penalty.
    bias_ids [R, C] int32 in [0, V), bias_values [R, C] float32, bias_until [R, C] int32: an entry
    works while position < until. named_ids [R, I] int32 in [0, V).
    """

    counts: Array
    bias_ids: Array
    bias_values: Array
    bias_until: Array
    named_ids: Array


class Drawn(NamedTuple):
    """tokens [B] int32, logprob [B] of them, top_values [B, top] and top_ids [B, top] best first,
    named [B, I]. Entries that nobody asked for are finite and otherwise unspecified; padding rows
    have token 0."""

    tokens: Array
    logprob: Array
    top_values: Array
    top_ids: Array
    named: Array


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    del dtype
    return ("triton", "xla") if device.is_cuda else ("xla",)


OPERATION = Operation(
    name="sample",
    implementations=(
        Implementation("triton", "pallas_kernels.sample.triton", cuda_only),
        Implementation("xla", "pallas_kernels.sample.xla"),
    ),
    order=_order,
)


def sample(
    logits: jax.Array,
    rows: SampleRows,
    slots: SlotLists,
    *,
    top: int,
    raw_logprobs: bool,
    fixed_split: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Drawn:
    """Draw one token per row of logits [B, V] float32; every parameter is per row.

    In this order: frequency and presence penalty, repetition penalty, bias, clean (NaN and -inf to
    the lowest float32, +inf to the highest). Greedy rows (top_k 1) take the first argmax. The
    others divide by the temperature (x = logit * (1 / temperature), clipped to float32's range) and
    keep a token if fewer than top_k tokens are strictly larger, their softmax mass is < top_p
    (always when top_p >= 1), and x >= max x + log(min_p). Ties stay in, and the largest x always
    does, however small top_p. The token is the argmax of x + Gumbel noise over the kept ones, the
    noise being a function of (seed, sample_index, position, token): see noise.py.

    top: columns of the best logprobs. raw_logprobs: logprobs of the cleaned logits instead of x
    (greedy rows: x = logits). Logprobs are never below float32's lowest. fixed_split: a row's sums
    are made of the same parts whatever the other rows want, and so are bitwise the same; otherwise
    rounding may decide differently about a token just at top_p. implementation: a name, or
    names in order of preference ("triton", "xla"); None is the default order of this device.

    Returns Drawn. Raises ValueError for arguments that do not fit together, NotImplementedError
    with every reason when no implementation can do the case. Gumbel-max sampling; filters as in
    SGLang and FlashInfer (joint top-k and top-p on one distribution), without their renormalizing.
    """
    if logits.ndim != 2 or logits.dtype != np.float32:
        raise ValueError(f"logits {logits.dtype}{list(logits.shape)}: expected float32[B, V]")
    batch, vocab = logits.shape
    for name, array in rows._asdict().items():
        dtype = np.float32 if name in FLOATS else np.int32
        checks.check_array(f"rows.{name}", array, (batch,), dtype)
    slot_count = slots.counts.shape[0]
    checks.check_int32("slots.counts", slots.counts, (slot_count, vocab))
    bias = (slot_count, *slots.bias_ids.shape[1:2])
    checks.check_int32("slots.bias_ids", slots.bias_ids, bias)
    checks.check_array("slots.bias_values", slots.bias_values, bias, np.float32)
    checks.check_int32("slots.bias_until", slots.bias_until, bias)
    named = (slot_count, *slots.named_ids.shape[1:2])
    checks.check_int32("slots.named_ids", slots.named_ids, named)
    if top < 0:
        raise ValueError(f"top={top}: expected at least 0")
    return OPERATION(
        logits,
        rows,
        slots,
        top=int(top),
        raw_logprobs=bool(raw_logprobs),
        fixed_split=bool(fixed_split),
        implementation=implementation,
        dtype=logits.dtype,
    )
