"""The sampler, Pallas on the Triton backend: no sort, no host, one or two reads of the logits.

draw    grid (chunks, B): everything that needs no threshold, one read of the logits
refine  grid (chunks, B), `rounds` launches: a read each for the rows that are undecided, else none
finish  grid (B,): whatever is still undecided, then logprobs and results

A tile is two runs of `lanes` tokens, HALF apart, because one threefry call serves such a pair:

    row of logits  |--lanes--|         ...       |--lanes--|         ...      |  block of 2*HALF
                        |  counters c0 .. c0+lanes   |
                        +---- threefry(key, c) ------+
                        | word 0                     | word 1

    draw, a chunk (some tiles) of one row:
        logits -> penalties, biases (rows that have any) -> clean -> x = scaled      (registers)
        per lane: max, sum of exp(x - max), best x + noise (greedy: best x)           (registers)
        per chunk, to memory: max, sum, best score and its token; and for rows that report them the
        `num_top` best tokens, each by one more walk over the chunk (L1 hits)

What is drawn is exactly the argmax of x + noise over the kept tokens, not an approximation. Being
kept is monotone in x: (fewer than top_k tokens above x) and (less than top_p of the mass above x)
and (x >= max + log min_p). So let `lo` be a value that is rejected and `hi` one that is kept:

    x   lowest ---------- lo -------- c ----- p ------ hi -------- max
        all rejected      |      undecided             | all kept

The candidate c is the best token above lo, by score. If it is kept, it is the best of the kept:
done. If not, all up to its x is rejected, lo rises to it, and the next candidate is the best above
the new lo. A pass over the row counts tokens and mass above four values of x: c (or lo), and three
pivots before hi, so that (lo, hi) shrinks; a candidate at or above hi needs no pass. Candidates
cost noise, so when one was rejected, passes without noise come first, until little is undecided:
then the next candidate is nearly always kept. After each candidate lo has risen or the row is done,
and every two passes without noise are followed by one with it: the loop ends.

Typical cost: rows without filters, or greedy, read their logits once; top-p rows twice; 1 - top_p
of those rows need another two or three passes. `refine` spreads a pass over the device, where
`finish` has one program a row, which matters when one row holds up the batch. A decided row's
programs exit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.device import Device, current_device
from pallas_kernels.sample import noise
from pallas_kernels.sample.api import RowParams, Samples, SlotLists
from pallas_kernels.softmax import LOG2E
from pallas_kernels.triton_ops import ceil_div, divmod_by, plt
from pallas_kernels.tuning import tuned

LOWEST = float(jnp.finfo(jnp.float32).min)
HIGHEST = float(jnp.finfo(jnp.float32).max)
NONE = float("-inf")  # below every cleaned logit: "no token"
NO_ID = 2**31 - 1
BIAS_BLOCK = 64
FOLD = 4
# a pass with noise is due when the undecided mass is at most 1/16 of what is above lo, when so few
# tokens are undecided, or after so many passes without noise
SMALL_MASS, SMALL_COUNT, MAX_NARROWED = 1 / 16, 32, 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """lanes: half of a tile's tokens, a power of two up to noise.HALF. programs: what a grid aims
    at, at most one a tile. num_warps: of a program. Those without prefix are draw's. rounds:
    launches of refine."""

    lanes: int = 512
    programs: int = 4096
    num_warps: int = 4
    rounds: int = 4
    refine_lanes: int = 512
    refine_programs: int = 8192
    refine_warps: int = 4
    finish_lanes: int = 1024
    finish_warps: int = 8


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    return dataclasses.replace(Sizes(), **tuned(device, "sample", "triton", features))


class _Inputs(NamedTuple):
    """References to what every kernel reads; lists without columns are None. inverse [B]:
    1 / temperature, 1 for greedy rows. key0, key1 [B] uint32: of the noise."""

    logits: Any
    rows: RowParams
    slots: SlotLists
    inverse: Any
    key0: Any
    key1: Any


class _Partials(NamedTuple):
    """What draw writes, [B, chunks]: largest cleaned logit, sum of exp(x - scaled largest), sum of
    exp(logit - largest) if logprobs are raw, best score and its token, [B, chunks * top] the best
    reported values and their tokens (NONE, NO_ID where there are fewer)."""

    largest: Any
    total: Any
    raw_total: Any
    score: Any
    token: Any
    top_values: Any
    top_ids: Any


class _Sums(NamedTuple):
    """What a refining pass finds: tokens and mass above each of four values of x (refine writes
    them as [B, chunks * 4]), and the best score above the first of them with its token."""

    counts: Any
    masses: Any
    score: Any
    token: Any


class _Row(NamedTuple):
    """Scalars of one row."""

    b: Any
    slot: Any
    position: Any
    inverse: Any
    greedy: Any
    penalized: Any
    num_bias: Any
    key0: Any
    key1: Any


class _Filter(NamedTuple):
    """Scalars: largest x, sum of exp(x - largest), and what a kept x satisfies: fewer than `count`
    tokens and less than `mass` (in units of that sum) above it, and x >= floor."""

    largest: Any
    total: Any
    count: Any
    mass: Any
    floor: Any


class _State(NamedTuple):
    """Scalars: where a row's search is. lo is rejected, hi is kept; tokens and mass above each.
    x, token: the best token above lo, if `known`. narrowed: passes without noise since the last
    with it. Refine stores it as [B, 8] float32 and [B, 8] int32."""

    lo: Any
    hi: Any
    lo_mass: Any
    hi_mass: Any
    x: Any
    lo_count: Any
    hi_count: Any
    token: Any
    known: Any
    narrowed: Any
    done: Any


STATE_FLOATS = 5
STATE_WIDTH = 8
DONE = _State._fields.index("done") - STATE_FLOATS


def _load_row(refs: _Inputs, b: jax.Array) -> _Row:
    rows = refs.rows
    repetition, frequency, presence = rows.repetition[b], rows.frequency[b], rows.presence[b]
    return _Row(
        b=b,
        slot=rows.slot[b],
        position=rows.position[b],
        inverse=refs.inverse[b],
        greedy=rows.top_k[b] == 1,
        penalized=(frequency != 0) | (presence != 0) | (repetition != 1),
        num_bias=rows.num_bias[b],
        key0=refs.key0[b],
        key1=refs.key1[b],
    )


# -- logits ---------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Token ids, all in [low, high) where they are < V, and whether they are."""

    ids: Any
    low: Any
    high: Any
    inside: Any


def _penalize(refs: _Inputs, row: _Row, run: _Run, x: Any) -> Any:
    view = refs.slots.counts.at[jnp.full_like(run.ids, row.slot), run.ids]
    count = plt.load(view, mask=run.inside, other=0)
    seen = count > 0
    lowered = x - refs.rows.frequency[row.b] * count.astype(jnp.float32)
    lowered = jnp.where(seen, lowered - refs.rows.presence[row.b], x)
    repetition = refs.rows.repetition[row.b]
    scaled = jnp.where(lowered < 0, lowered * repetition, lowered / repetition)
    return jnp.where(seen, scaled, x)


def _add_bias(refs: _Inputs, row: _Row, run: _Run, x: Any) -> Any:
    """Entries are looked at BIAS_BLOCK at a time; one by one only where some lie in the run."""
    slots = refs.slots
    count = jnp.minimum(row.num_bias, slots.bias_ids.shape[1])

    def block(j: Any, x: Any) -> Any:
        first = j * BIAS_BLOCK
        entries = first + jnp.arange(BIAS_BLOCK, dtype=jnp.int32)
        live = entries < count
        where = jnp.full_like(entries, row.slot), entries
        bias_ids = plt.load(slots.bias_ids.at[where], mask=live, other=-1)
        hits = live & (bias_ids >= run.low) & (bias_ids < run.high)

        def entry(e: Any, x: Any) -> Any:
            active = row.position < slots.bias_until[row.slot, e]
            match = (run.ids == slots.bias_ids[row.slot, e]) & active
            return jnp.where(match, x + slots.bias_values[row.slot, e], x)

        def each(x: Any) -> Any:
            return lax.fori_loop(first, jnp.minimum(first + BIAS_BLOCK, count), entry, x)

        return lax.cond(jnp.sum(hits.astype(jnp.int32)) > 0, each, lambda x: x, x)

    return lax.fori_loop(0, ceil_div(count, BIAS_BLOCK), block, x)


def _load_logits(refs: _Inputs, row: _Row, runs: tuple[_Run, ...]) -> tuple[Any, ...]:
    """Logits of each run, penalized, biased and cleaned: what every launch means by a logit. NONE
    outside the vocabulary. All loads come first, so that they wait for memory together."""

    def load(run: _Run) -> Any:
        view = refs.logits.at[jnp.full_like(run.ids, row.b), run.ids]
        return plt.load(view, mask=run.inside, other=0.0)

    def each(change: Any) -> Any:
        return lambda *xs: tuple(change(refs, row, run, x) for run, x in zip(runs, xs, strict=True))

    def same(*xs: Any) -> Any:
        return xs

    xs = tuple(load(run) for run in runs)
    xs = lax.cond(row.penalized, each(_penalize), same, *xs)
    if refs.slots.bias_ids is not None:
        xs = lax.cond(row.num_bias > 0, each(_add_bias), same, *xs)
    cleaned = []
    for run, x in zip(runs, xs, strict=True):
        x = jnp.where(x == x, x, LOWEST)
        x = jnp.minimum(jnp.maximum(x, LOWEST), HIGHEST)
        cleaned.append(jnp.where(run.inside, x, NONE))
    return tuple(cleaned)


def _scale(row: _Row, logits: Any) -> Any:
    """Clipping keeps a hot row's largest logits apart from infinity. NONE stays NONE."""
    x = jnp.minimum(jnp.maximum(logits * row.inverse, LOWEST), HIGHEST)
    return jnp.where(logits == NONE, NONE, x)


def _tile(i: Any, lanes: int) -> tuple[Any, Any, Any]:
    """Of tile i: first counter, and the first token of either run."""
    counter = i * lanes
    block, _ = divmod_by(counter, noise.HALF)
    low = counter + block * noise.HALF
    return counter, low, low + noise.HALF


def _load_tile(refs: _Inputs, row: _Row, i: Any, lanes: int) -> tuple[Any, Any, Any, Any]:
    """(logits, ids) of the low run and of the high run of tile i."""
    vocab = refs.logits.shape[1]
    lane = jnp.arange(lanes, dtype=jnp.int32)
    runs = tuple(
        _Run(first + lane, first, first + lanes, first + lane < vocab)
        for first in _tile(i, lanes)[1:]
    )
    low, high = _load_logits(refs, row, runs)
    return low, runs[0].ids, high, runs[1].ids


def _tile_noise(row: _Row, i: Any, lanes: int) -> tuple[Any, Any]:
    """Gumbel noise of the low run and of the high run of tile i."""
    counters = (_tile(i, lanes)[0] + jnp.arange(lanes, dtype=jnp.int32)).astype(jnp.uint32)
    key0, key1 = jnp.full_like(counters, row.key0), jnp.full_like(counters, row.key1)
    words = noise.threefry2x32(key0, key1, counters, jnp.zeros_like(counters))
    return noise.gumbel(words[0]), noise.gumbel(words[1])


# -- best of many ---------------------------------------------------------------------------------


class _Best(NamedTuple):
    """Per lane, the best score so far and its id. Ids only grow from call to call of `better`, so a
    tie keeps the smaller one; that is why low and high runs have one each."""

    score: Any
    ids: Any


def _nothing(lanes: int) -> _Best:
    return _Best(jnp.full((lanes,), NONE, jnp.float32), jnp.full((lanes,), NO_ID, jnp.int32))


def _better(best: _Best, score: Any, ids: Any) -> _Best:
    better = score > best.score
    return _Best(jnp.where(better, score, best.score), jnp.where(better, ids, best.ids))


def _smallest_best(score: Any, ids: Any) -> tuple[Any, Any]:
    """The largest score and the smallest of the ids that have it."""
    most = jnp.max(score)
    return most, jnp.min(jnp.where(score == most, ids, NO_ID))


def _winner(low: _Best, high: _Best) -> tuple[Any, Any]:
    score = jnp.maximum(low.score, high.score)
    low_ids = jnp.where(low.score == score, low.ids, NO_ID)
    high_ids = jnp.where(high.score == score, high.ids, NO_ID)
    return _smallest_best(score, jnp.minimum(low_ids, high_ids))


def _after(values: Any, ids: Any, last: tuple[Any, Any]) -> Any:
    """`values`, NONE where they do not come after `last` (value, id) in order of falling value and
    rising id."""
    value, i = last
    return jnp.where((values < value) | ((values == value) & (ids > i)), values, NONE)


# -- draw -----------------------------------------------------------------------------------------


def _draw_kernel(refs, out, *, lanes, tiles, per_chunk, top, raw):
    chunk, b = pl.program_id(0), pl.program_id(1)
    begin = chunk * per_chunk
    end = jnp.minimum(begin + per_chunk, tiles)

    def run():
        row = _load_row(refs, b)

        def tile(i, carry):
            largest, total, raw_total, best_low, best_high = carry
            low, low_ids, high, high_ids = _load_tile(refs, row, i, lanes)
            low_x, high_x = _scale(row, low), _scale(row, high)
            new = jnp.maximum(largest, jnp.maximum(low, high))
            scaled = _scale(row, new)
            total = total * _exp(_scale(row, largest) - scaled)
            total += _exp(low_x - scaled) + _exp(high_x - scaled)
            if raw:
                raw_total = raw_total * _exp(largest - new) + _exp(low - new) + _exp(high - new)

            def noisy():
                low_noise, high_noise = _tile_noise(row, i, lanes)
                return low_x + low_noise, high_x + high_noise

            low_score, high_score = lax.cond(row.greedy, lambda: (low, high), noisy)
            best_low = _better(best_low, low_score, low_ids)
            best_high = _better(best_high, high_score, high_ids)
            return new, total, raw_total, best_low, best_high

        zeros = jnp.zeros((lanes,), jnp.float32)
        lowest = jnp.full((lanes,), LOWEST, jnp.float32)
        start = lowest, zeros, zeros if raw else None, _nothing(lanes), _nothing(lanes)
        largest, total, raw_total, best_low, best_high = lax.fori_loop(begin, end, tile, start)
        most = jnp.max(largest)
        score, token = _winner(best_low, best_high)
        out.largest[b, chunk] = most
        out.total[b, chunk] = jnp.sum(total * _exp(_scale(row, largest) - _scale(row, most)))
        out.score[b, chunk] = score
        out.token[b, chunk] = token
        if raw:
            out.raw_total[b, chunk] = jnp.sum(raw_total * _exp(largest - most))
        if top:
            count = jnp.minimum(refs.rows.num_top[b], top)
            count = jnp.where(refs.rows.wants_logprob[b] > 0, count, 0)

            def pick(j, last):
                def walk(i, carry):
                    low, low_ids, high, high_ids = _load_tile(refs, row, i, lanes)
                    if not raw:
                        low, high = _scale(row, low), _scale(row, high)
                    best_low = _better(carry[0], _after(low, low_ids, last), low_ids)
                    return best_low, _better(carry[1], _after(high, high_ids, last), high_ids)

                value, i = _winner(*lax.fori_loop(begin, end, walk, (_nothing(lanes),) * 2))
                out.top_values[b, chunk * top + j] = value
                out.top_ids[b, chunk * top + j] = i
                return value, i

            lax.fori_loop(0, count, pick, (jnp.float32(jnp.inf), jnp.int32(-1)))

    pl.when(refs.rows.live[b] != 0)(run)


def _exp(x: Any) -> Any:
    return jnp.exp2(x * LOG2E)


def _load_chunks(
    ref: Any, b: Any, chunks: int, other: Any, stride: int = 1, column: int = 0
) -> Any:
    """One number per chunk, padded with `other` to a power of two."""
    ids = jnp.arange(pl.next_power_of_2(chunks), dtype=jnp.int32)
    view = ref.at[jnp.full_like(ids, b), ids * stride + column]
    return plt.load(view, mask=ids < chunks, other=other)


# -- the search -----------------------------------------------------------------------------------


def _load_filter(refs: _Inputs, row: _Row, parts: _Partials, chunks: int) -> _Filter:
    vocab = refs.logits.shape[1]
    rows, b = refs.rows, row.b
    largest = _scale(row, _load_chunks(parts.largest, b, chunks, LOWEST))
    most = jnp.max(largest)
    total = jnp.sum(_load_chunks(parts.total, b, chunks, 0.0) * _exp(largest - most))
    top_k, top_p, min_p = rows.top_k[b], rows.top_p[b], rows.min_p[b]
    return _Filter(
        largest=most,
        total=total,
        count=jnp.where(row.greedy | (top_k >= vocab), NO_ID, top_k),
        mass=jnp.where(row.greedy | (top_p >= 1), jnp.inf, top_p * total),
        floor=jnp.where(row.greedy | (min_p <= 0), NONE, most + jnp.log(min_p)),
    )


def _load_x(refs: _Inputs, row: _Row, token: Any) -> Any:
    run = _Run(token, token, token + 1, token < refs.logits.shape[1])
    return _scale(row, *_load_logits(refs, row, (run,)))


def _begin(refs: _Inputs, row: _Row, parts: _Partials, want: _Filter, chunks: int) -> _State:
    """The state after draw."""
    vocab = refs.logits.shape[1]
    score = _load_chunks(parts.score, row.b, chunks, NONE)
    _, token = _smallest_best(score, _load_chunks(parts.token, row.b, chunks, NO_ID))
    x = _load_x(refs, row, token)
    counted = (want.count < vocab) | (want.mass < jnp.inf)
    # without top-k and top-p, all from `floor` on is kept; else only the largest is known to be
    hi = jnp.where(counted, want.largest, jnp.maximum(want.floor, LOWEST))
    below = want.floor - jnp.maximum(jnp.abs(want.floor) * 2.0**-22, 1e-37)
    known = x >= want.floor
    everything = jnp.int32(vocab), want.total
    return _State(
        lo=jnp.where(known, NONE, below),
        hi=hi,
        lo_count=everything[0],
        lo_mass=everything[1],
        hi_count=jnp.where(counted, 0, everything[0]),
        hi_mass=jnp.where(counted, 0.0, everything[1]),
        x=x,
        token=token,
        known=known.astype(jnp.int32),
        narrowed=jnp.int32(0),
        done=(x >= hi).astype(jnp.int32),
    )


def _plan(state: _State, want: _Filter) -> tuple[tuple[Any, ...], Any]:
    """The next pass: four values of x to count above, and whether it looks for a candidate."""
    known = state.known != 0
    base = jnp.where(known, state.x, state.lo)

    def crossing(at_lo: Any, at_hi: Any, wanted: Any) -> Any:
        """Where between lo and hi the amount above falls to `wanted`, if its log falls evenly."""
        fall = jnp.log(at_lo) - jnp.log(jnp.minimum(at_hi, at_lo * 0.5))
        return (jnp.log(at_lo) - jnp.log(wanted)) / fall

    # the largest x has nothing above it, itself weighs 1: half of that keeps the logs finite
    lo_count = jnp.maximum(state.lo_count.astype(jnp.float32), 1.0)
    hi_count = jnp.maximum(state.hi_count.astype(jnp.float32), 0.5)
    lo_mass, hi_mass = jnp.maximum(state.lo_mass, 1.0), jnp.maximum(state.hi_mass, 0.5)
    by_count = crossing(lo_count, hi_count, want.count.astype(jnp.float32))
    by_mass = crossing(lo_mass, hi_mass, jnp.minimum(want.mass, HIGHEST))
    guess = jnp.minimum(jnp.maximum(jnp.maximum(by_count, by_mass), 0.1), 0.9)
    guess = jnp.where(known, 0.5, guess)
    around = jnp.where(known, 0.25, jnp.minimum(guess, 1.0 - guess) * 0.25)

    def between(fraction: Any) -> Any:
        pivot = base * (1.0 - fraction) + state.hi * fraction
        return jnp.where((pivot > base) & (pivot < state.hi), pivot, base)

    pivots = base, between(guess - around), between(guess + around), between(jnp.float32(0.5))
    undecided_mass = state.lo_mass - state.hi_mass
    few = state.lo_count - state.hi_count <= SMALL_COUNT
    settled = few | (undecided_mass <= state.lo_mass * SMALL_MASS)
    return pivots, ~known & (settled | (state.narrowed >= MAX_NARROWED))


def _fold(x: Any) -> Any:
    """Sums of FOLD neighbours, which one thread holds: fewer registers carry the eight sums."""
    return jnp.sum(x.reshape(-1, FOLD), axis=1)


def _pass(
    refs: _Inputs, row: _Row, want: _Filter, pivots: Any, noisy: Any, begin: Any, end: Any,
    lanes: int,
) -> _Sums:  # fmt: skip
    """Count tokens and mass above each pivot in tiles [begin, end), and if `noisy` find the best
    score above the first pivot; tiles without such a token need no noise."""

    def tile(i, carry):
        counts, masses, best_low, best_high = carry
        low, low_ids, high, high_ids = _load_tile(refs, row, i, lanes)
        low, high = _scale(row, low), _scale(row, high)
        low_mass, high_mass = _exp(low - want.largest), _exp(high - want.largest)
        counts = tuple(
            count + _fold((low > p).astype(jnp.int32) + (high > p).astype(jnp.int32))
            for count, p in zip(counts, pivots, strict=True)
        )
        masses = tuple(
            mass + _fold(jnp.where(low > p, low_mass, 0.0) + jnp.where(high > p, high_mass, 0.0))
            for mass, p in zip(masses, pivots, strict=True)
        )

        def look(best_low, best_high):
            low_noise, high_noise = _tile_noise(row, i, lanes)
            low_score = jnp.where(low > pivots[0], low + low_noise, NONE)
            high_score = jnp.where(high > pivots[0], high + high_noise, NONE)
            return _better(best_low, low_score, low_ids), _better(best_high, high_score, high_ids)

        some = noisy & (jnp.max(jnp.maximum(low, high)) > pivots[0])
        best_low, best_high = lax.cond(some, look, lambda *best: best, best_low, best_high)
        return counts, masses, best_low, best_high

    start = (
        (jnp.zeros((lanes // FOLD,), jnp.int32),) * 4,
        (jnp.zeros((lanes // FOLD,), jnp.float32),) * 4,
        _nothing(lanes),
        _nothing(lanes),
    )
    counts, masses, best_low, best_high = lax.fori_loop(begin, end, tile, start)
    return _Sums(
        tuple(jnp.sum(count) for count in counts),
        tuple(jnp.sum(mass) for mass in masses),
        *_winner(best_low, best_high),
    )


def _advance(
    refs: _Inputs, row: _Row, want: _Filter, state: _State, pivots: Any, noisy: Any, sums: _Sums
) -> _State:
    """The state after a pass over the whole row."""
    lo, lo_count, lo_mass = state.lo, state.lo_count, state.lo_mass
    hi, hi_count, hi_mass = state.hi, state.hi_count, state.hi_mass
    for pivot, count, mass in zip(pivots, sums.counts, sums.masses, strict=True):
        enough = (count >= want.count) | (mass >= want.mass)
        rejected = (enough | (pivot < want.floor)) & (pivot >= lo)
        kept = jnp.maximum(pivot, want.floor)
        lower = ~enough & (kept < hi)
        lo = jnp.where(rejected, pivot, lo)
        lo_count, lo_mass = jnp.where(rejected, count, lo_count), jnp.where(rejected, mass, lo_mass)
        hi = jnp.where(lower, kept, hi)
        hi_count, hi_mass = jnp.where(lower, count, hi_count), jnp.where(lower, mass, hi_mass)
    vocab = refs.logits.shape[1]
    token = jnp.where(noisy, jnp.minimum(sums.token, vocab - 1), state.token)
    x = lax.cond(noisy, lambda: _load_x(refs, row, token), lambda: state.x)
    candidate = noisy | (state.known != 0)
    return _State(
        lo=lo,
        hi=hi,
        lo_count=lo_count,
        lo_mass=lo_mass,
        hi_count=hi_count,
        hi_mass=hi_mass,
        x=x,
        token=token,
        known=(candidate & (x > lo)).astype(jnp.int32),
        narrowed=jnp.where(noisy, 0, state.narrowed + 1),
        done=(candidate & (x >= hi)).astype(jnp.int32),
    )


def _load_state(floats: Any, ints: Any, b: Any) -> _State:
    at = range(len(_State._fields) - STATE_FLOATS)
    return _State(*(floats[b, i] for i in range(STATE_FLOATS)), *(ints[b, i] for i in at))


def _load_sums(sums: _Sums, b: Any, chunks: int) -> _Sums:
    score = _load_chunks(sums.score, b, chunks, NONE)
    return _Sums(
        tuple(jnp.sum(_load_chunks(sums.counts, b, chunks, 0, 4, i)) for i in range(4)),
        tuple(jnp.sum(_load_chunks(sums.masses, b, chunks, 0.0, 4, i)) for i in range(4)),
        *_smallest_best(score, _load_chunks(sums.token, b, chunks, NO_ID)),
    )


def _refine_kernel(refs, parts, before, out, *, lanes, tiles, per_chunk, chunks, drawn):
    chunk, b = pl.program_id(0), pl.program_id(1)
    floats, ints, sums = out

    def store(state: _State) -> None:
        for i, value in enumerate(state[:STATE_FLOATS]):
            floats[b, i] = value
        for i, value in enumerate(state[STATE_FLOATS:]):
            ints[b, i] = value

    def run():
        row = _load_row(refs, b)
        want = _load_filter(refs, row, parts, drawn)
        state = _resume(refs, row, parts, want, before, chunks, drawn)

        def search():
            pivots, noisy = _plan(state, want)
            begin = chunk * per_chunk
            end = jnp.minimum(begin + per_chunk, tiles)
            found = _pass(refs, row, want, pivots, noisy, begin, end, lanes)
            for i in range(4):
                sums.counts[b, chunk * 4 + i] = found.counts[i]
                sums.masses[b, chunk * 4 + i] = found.masses[i]
            sums.score[b, chunk] = found.score
            sums.token[b, chunk] = found.token

        pl.when(chunk == 0)(lambda: store(state))
        pl.when(state.done == 0)(search)

    live = refs.rows.live[b] != 0
    if before is None:
        pl.when(live)(run)
        return
    done = before[1][b, DONE] != 0
    pl.when(live & ~done)(run)
    pl.when(live & done & (chunk == 0))(lambda: store(_load_state(before[0], before[1], b)))


def _resume(
    refs: _Inputs, row: _Row, parts: _Partials, want: _Filter, before: Any, chunks: int, drawn: int
) -> _State:
    """The state that the launches so far have reached, to which every program of a row comes alike.
    before: None right after draw, else what the last refine wrote, whose pass is not yet in its
    state. chunks: of refine, drawn: of draw."""
    if before is None:
        return _begin(refs, row, parts, want, drawn)
    floats, ints, sums = before
    state = _load_state(floats, ints, row.b)

    def advance(state: _State) -> _State:
        plan = _plan(state, want)
        return _advance(refs, row, want, state, *plan, _load_sums(sums, row.b, chunks))

    return lax.cond(state.done != 0, lambda state: state, advance, state)


# -- finish ---------------------------------------------------------------------------------------


def _finish_kernel(refs, parts, before, out, *, lanes, tiles, chunks, drawn, top, raw):
    b = pl.program_id(0)
    named_count = 0 if refs.slots.named_ids is None else refs.slots.named_ids.shape[1]
    named_ids = jnp.arange(pl.next_power_of_2(max(named_count, 1)), dtype=jnp.int32)
    at_named = jnp.full_like(named_ids, b), named_ids
    top_ids = jnp.arange(pl.next_power_of_2(max(top, 1)), dtype=jnp.int32)
    at_top = jnp.full_like(top_ids, b), top_ids

    def silence():
        """What nobody asked for is still finite."""
        out.logprob[b] = jnp.float32(0.0)
        if named_count:
            zeros = jnp.zeros(named_ids.shape, jnp.float32)
            plt.store(out.named.at[at_named], zeros, mask=named_ids < named_count)
        if top:
            zeros = jnp.zeros(top_ids.shape, jnp.float32)
            plt.store(out.top_values.at[at_top], zeros, mask=top_ids < top)
            plt.store(out.top_ids.at[at_top], zeros.astype(jnp.int32), mask=top_ids < top)

    def run():
        row = _load_row(refs, b)
        want = _load_filter(refs, row, parts, drawn)

        def step(state: _State) -> _State:
            plan = _plan(state, want)
            return _advance(
                refs, row, want, state, *plan,
                _pass(refs, row, want, *plan, jnp.int32(0), jnp.int32(tiles), lanes),
            )  # fmt: skip

        start = _resume(refs, row, parts, want, before, chunks, drawn)
        token = lax.while_loop(lambda state: state.done == 0, step, start).token
        out.tokens[b] = token

        def report():
            if raw:
                largest = _load_chunks(parts.largest, b, drawn, LOWEST)
                most = jnp.max(largest)
                total = jnp.sum(_load_chunks(parts.raw_total, b, drawn, 0.0) * _exp(largest - most))
            else:
                most, total = want.largest, want.total
            log_sum = jnp.log(total)

            def logprob(x: Any) -> Any:
                return jnp.maximum(x - most - log_sum, LOWEST)

            def at(ids: Any) -> Any:
                vocab = refs.logits.shape[1]
                run = _Run(ids, jnp.int32(0), jnp.int32(vocab), ids < vocab)
                (logits,) = _load_logits(refs, row, (run,))
                return logprob(logits if raw else _scale(row, logits))

            out.logprob[b] = at(token)
            if named_count:
                asked = named_ids < refs.rows.num_named[b]
                where = jnp.full_like(named_ids, row.slot), named_ids
                inside = named_ids < named_count
                ids = plt.load(refs.slots.named_ids.at[where], mask=asked & inside, other=0)
                plt.store(out.named.at[at_named], at(ids), mask=inside)
            if top:
                _store_top(refs, parts, b, logprob, out, top, drawn)

        pl.when(refs.rows.wants_logprob[b] != 0)(report)

    live, wants = refs.rows.live[b] != 0, refs.rows.wants_logprob[b] != 0

    def pad():
        out.tokens[b] = jnp.int32(0)

    pl.when(~(live & wants))(silence)
    pl.when(live)(run)
    pl.when(~live)(pad)


def _store_top(refs, parts, b, logprob, out, top, chunks):
    """The best of the chunks' best, one after the other."""
    count = jnp.minimum(refs.rows.num_top[b], top)
    flat = jnp.arange(pl.next_power_of_2(chunks * top), dtype=jnp.int32)
    _, column = divmod_by(flat, top)
    written = (flat < chunks * top) & (column < count)
    where = jnp.full_like(flat, b), flat
    values = plt.load(parts.top_values.at[where], mask=written, other=NONE)
    ids = plt.load(parts.top_ids.at[where], mask=written, other=NO_ID)

    def pick(j, last):
        value, i = _smallest_best(_after(values, ids, last), ids)
        found = (j < count) & (value > NONE)
        out.top_values[b, j] = jnp.where(found, logprob(value), 0.0)
        out.top_ids[b, j] = jnp.where(found, i, 0)
        return value, i

    lax.fori_loop(0, top, pick, (jnp.float32(jnp.inf), jnp.int32(-1)))


def sample(
    logits: jax.Array,
    rows: RowParams,
    slots: SlotLists,
    *,
    top: int,
    raw_logprobs: bool,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> Samples:
    """See pallas_kernels.sample. interpret: run on any backend, slowly."""
    batch, vocab = logits.shape
    if sizes is None:
        sizes = default_sizes(current_device(), {"batch": batch, "vocab": vocab})
    counters = noise.counter_count(vocab)

    def share(lanes: int, programs: int) -> tuple[int, int, int]:
        """(tiles of a row, tiles of a chunk, chunks)."""
        tiles = pl.cdiv(counters, lanes)
        per_chunk = pl.cdiv(tiles, max(1, programs // batch))
        return tiles, per_chunk, pl.cdiv(tiles, per_chunk)

    tiles, per_chunk, drawn = share(sizes.lanes, sizes.programs)
    refine_tiles, refine_per_chunk, chunks = share(sizes.refine_lanes, sizes.refine_programs)
    width = slots.named_ids.shape[1]
    inputs = _Inputs(
        logits,
        rows,
        SlotLists(*(array if array.size else None for array in slots)),
        1.0 / jnp.where(rows.top_k == 1, 1.0, rows.temperature),
        *noise.row_keys(rows.seed, rows.sample_index, rows.position),
    )

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.int32)

    call = functools.partial(triton_call, num_stages=1, interpret=interpret)
    (parts,) = call(
        functools.partial(
            _draw_kernel, lanes=sizes.lanes, tiles=tiles, per_chunk=per_chunk, top=top,
            raw=raw_logprobs,
        ),
        name="sample_draw",
        grid=(drawn, batch),
        out_shape=[_Partials(
            largest=floats(drawn),
            total=floats(drawn),
            raw_total=floats(drawn) if raw_logprobs else None,
            score=floats(drawn),
            token=ints(drawn),
            top_values=floats(drawn * top) if top else None,
            top_ids=ints(drawn * top) if top else None,
        )],
        num_warps=sizes.num_warps,
    )(inputs)  # fmt: skip
    sums = _Sums(ints(chunks * 4), floats(chunks * 4), floats(chunks), ints(chunks))
    before = None
    for _ in range(sizes.rounds):
        (before,) = call(
            functools.partial(
                _refine_kernel, lanes=sizes.refine_lanes, tiles=refine_tiles,
                per_chunk=refine_per_chunk, chunks=chunks, drawn=drawn,
            ),
            name="sample_refine",
            grid=(chunks, batch),
            out_shape=[(floats(STATE_WIDTH), ints(STATE_WIDTH), sums)],
            num_warps=sizes.refine_warps,
        )(inputs, parts, before)  # fmt: skip
    (found,) = call(
        functools.partial(
            _finish_kernel, lanes=sizes.finish_lanes, tiles=pl.cdiv(counters, sizes.finish_lanes),
            chunks=chunks, drawn=drawn, top=top, raw=raw_logprobs,
        ),
        name="sample_finish",
        grid=(batch,),
        out_shape=[Samples(
            tokens=ints(),
            logprob=floats(),
            top_values=floats(top) if top else None,
            top_ids=ints(top) if top else None,
            named=floats(width) if width else None,
        )],
        num_warps=sizes.finish_warps,
    )(inputs, parts, before)  # fmt: skip
    return Samples(
        found.tokens,
        found.logprob,
        jnp.zeros((batch, top)) if found.top_values is None else found.top_values,
        jnp.zeros((batch, top), jnp.int32) if found.top_ids is None else found.top_ids,
        jnp.zeros((batch, width)) if found.named is None else found.named,
    )
