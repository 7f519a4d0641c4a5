"""Pieces of the Triton sampler: a tile's tokens, its logits and how they are changed, the best.

A tile [2, lanes] is two runs of tokens, HALF apart: see triton.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.sample import noise
from pallas_kernels.sample.api import SampleRows, SlotLists
from pallas_kernels.sample.search import HIGHEST, LOWEST, NO_ID, NONE
from pallas_kernels.softmax import LOG2E
from pallas_kernels.triton_ops import ceil_div, divmod_by, plt

BIAS_BLOCK = 512
Best = tuple[Any, Any]  # a score and its token


class Inputs(NamedTuple):
    """What every kernel reads; lists without columns are None. inverse [B]: 1 / temperature, 1 for
    greedy rows. key0, key1 [B] uint32: of the noise."""

    rows: SampleRows
    slots: SlotLists
    inverse: Any
    key0: Any
    key1: Any


def token_ids(i: Any, lanes: int) -> Any:
    """[2, lanes] tokens of tile i."""
    first = i * lanes + divmod_by(i * lanes, noise.HALF)[0] * noise.HALF
    half = lax.broadcasted_iota(jnp.int32, (2, lanes), 0)
    return half * noise.HALF + lax.broadcasted_iota(jnp.int32, (2, lanes), 1) + first


def tile_of(ids: Any, lanes: int) -> Any:
    block, rest = divmod_by(ids, 2 * noise.HALF)
    return divmod_by(block * noise.HALF + divmod_by(rest, noise.HALF)[1], lanes)[0]


def at_ids(ref: Any, row: Any, ids: Any) -> Any:
    return ref.at[jnp.full_like(ids, row), ids]


def first_ids(count: int) -> tuple[Any, Any]:
    """0, 1, ... of a power of two, and which of them are below count."""
    ids = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    return ids, ids < count


def clean(logits: Any) -> Any:
    return lax.clamp(LOWEST, jnp.where(logits == logits, logits, LOWEST), HIGHEST)


def scale(logits: Any, inverse: Any) -> Any:
    """Clipping keeps a hot row's largest logits apart from infinity."""
    return lax.clamp(LOWEST, logits * inverse, HIGHEST)


def load_tile(logits: Any, b: Any, ids: Any, inverse: Any) -> tuple[Any, Any]:
    """Cleaned logits of tokens `ids`, LOWEST outside the vocabulary, and x, NONE there."""
    inside = ids < logits.shape[1]
    cleaned = clean(plt.load(at_ids(logits, b, ids), mask=inside, other=LOWEST))
    return cleaned, jnp.where(inside, scale(cleaned, inverse), NONE)


def exp(x: Any) -> Any:
    return jnp.exp2(x * LOG2E)


# -- the best of many -----------------------------------------------------------------------------


def nobody() -> Best:
    return jnp.float32(NONE), jnp.int32(NO_ID)


def smallest_best(score: Any, ids: Any) -> Best:
    """The largest score and the smallest of the ids that have it."""
    most = jnp.max(score)
    return most, jnp.min(jnp.where(score == most, ids, NO_ID))


def better(best: Best, score: Any, ids: Any) -> Best:
    """`best`, or that of arrays if it is larger, or as large with a smaller id."""
    most, first = smallest_best(score, ids)
    wins = (most > best[0]) | ((most == best[0]) & (first < best[1]))
    return jnp.where(wins, most, best[0]), jnp.where(wins, first, best[1])


def those_after(values: Any, ids: Any, last: Best) -> Any:
    """`values`, NONE where they do not follow `last` in order of falling value and rising id."""
    value, i = last
    return jnp.where((values < value) | ((values == value) & (ids > i)), values, NONE)


def better_noisy(
    best: Best, refs: Inputs, b: Any, i: Any, x: Any, weight: Any, largest: Any, greedy: Any
) -> Best:
    """`best`, or that of x + noise in tile i; weight is exp(x - largest). greedy: None for no.

    Noise is -log E of an exponential E > w, w being the uniform that it is made of. So a token with
    w >= exp(x - best) is no better, which is true of most tiles as a whole and takes a fraction of
    the logarithms to see. `slack` covers the rounding. Greedy rows have E = w = 1.
    """
    lanes = x.shape[1]

    def threefry() -> Any:
        counters = lax.broadcasted_iota(jnp.int32, (1, lanes), 1) + i * lanes
        counters = counters.astype(jnp.uint32)
        key0, key1 = (jnp.full_like(counters, key[b]) for key in (refs.key0, refs.key1))
        zeros = jnp.zeros_like(counters)
        words = noise.threefry2x32(key0, key1, counters, zeros, rounds=noise.ROUNDS)
        return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) == 0, *words)

    def ones() -> Any:
        return jnp.full(x.shape, 2**32 - 1, jnp.uint32)

    def look() -> Best:
        gumbel = noise.gumbel(bits)
        if greedy is not None:
            gumbel = jnp.where(greedy, 0.0, gumbel)
        return better(best, x + gumbel, token_ids(i, lanes))

    bits = threefry() if greedy is None else lax.cond(greedy, ones, threefry)
    slack = 1e-4 + 1e-6 * jnp.maximum(jnp.abs(largest), jnp.abs(best[0]))
    reach = exp(jnp.minimum(largest - best[0] + slack, 60.0)) * 2.0**32
    return lax.cond(jnp.max(weight * reach - bits.astype(jnp.float32)) > 0, look, lambda: best)


# -- changing logits ------------------------------------------------------------------------------


def barrier(interpret: bool) -> None:
    """What any thread of the program stored before, each of them loads after."""
    if not interpret:
        plt.debug_barrier()


def change_logits(logits, refs, b, begin, end, lanes, interpret):
    """Penalize and bias the tokens of tiles [begin, end), in memory."""
    rows, slots, slot = refs.rows, refs.slots, refs.rows.slot[b]
    frequency, presence, repetition = rows.frequency[b], rows.presence[b], rows.repetition[b]
    penalized = (frequency != 0) | (presence != 0) | (repetition != 1)
    columns = 0 if slots.bias_ids is None else slots.bias_ids.shape[1]
    num_bias = jnp.minimum(rows.num_bias[b], columns)

    def penalize(i, _):
        ids = token_ids(i, lanes)
        inside = ids < logits.shape[1]
        count = plt.load(at_ids(slots.counts, slot, ids), mask=inside, other=0)
        x = plt.load(at_ids(logits, b, ids), mask=inside, other=0.0)
        x = x - frequency * count.astype(jnp.float32) - presence
        x = jnp.where(x < 0, x * repetition, x / repetition)
        plt.store(at_ids(logits, b, ids), x, mask=inside & (count > 0))
        return _

    def add_biases(j, _):
        """Those of a block that are this program's, one after the other: ids may repeat."""
        entries = j * BIAS_BLOCK + jnp.arange(BIAS_BLOCK, dtype=jnp.int32)
        live = entries < num_bias
        ids = plt.load(at_ids(slots.bias_ids, slot, entries), mask=live, other=0)
        until = plt.load(at_ids(slots.bias_until, slot, entries), mask=live, other=0)
        tile = tile_of(ids, lanes)
        mine = live & (rows.position[b] < until) & (tile >= begin) & (tile < end)

        def after(entry):
            return jnp.min(jnp.where(mine & (entries > entry), entries, NO_ID))

        def add(entry):
            token = slots.bias_ids[slot, entry]
            logits[b, token] = logits[b, token] + slots.bias_values[slot, entry]
            return after(entry)

        lax.while_loop(lambda entry: entry < NO_ID, add, after(-1))
        return _

    def change():
        lax.fori_loop(begin, jnp.where(penalized, end, begin), penalize, 0)
        barrier(interpret)
        if columns:
            lax.fori_loop(0, ceil_div(num_bias, BIAS_BLOCK), add_biases, 0)
            barrier(interpret)

    pl.when(penalized | (num_bias > 0))(change)
