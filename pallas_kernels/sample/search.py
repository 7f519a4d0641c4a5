"""Finding the best kept token without a sort: what is known of a row, and what to look at next.

What is drawn is exactly the argmax of x + noise over the kept tokens, not an approximation. Being
kept is monotone in x: (fewer than top_k tokens above x) and (less than top_p of the mass above x)
and (x >= max + log min_p). So let `lo` be a value that is rejected and `hi` one that is kept:

    x   lowest ---------- lo -------- c ----- p ------ hi -------- max
        all rejected      |      undecided             | all kept

The candidate c is the best token above lo, by score. If it is kept, it is the best of the kept:
done. If not, all up to its x is rejected, lo rises to it, and the next candidate is the best above
the new lo. A pass over the row counts tokens and mass above PIVOTS values of x: c (or lo), and
others before hi, so that (lo, hi) shrinks; a candidate at or above hi needs no pass. Candidates
cost noise, so when one was rejected, passes without noise come first, until little is undecided:
then the next candidate is nearly always kept. After each candidate lo has risen or the row is done,
and every two passes without noise are followed by one with it: the loop ends.

Functions of one row's scalars that also lower inside a Pallas kernel, jitted so that the kernels of
all programs share one trace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = float(jnp.finfo(jnp.float32).min)
HIGHEST = float(jnp.finfo(jnp.float32).max)
NONE = float("-inf")  # below every x: "no token"
NO_ID = 2**31 - 1
PIVOTS = 4  # a power of two, at least 4
# a pass with noise is due when the undecided mass is at most 1/16 of what is above lo, when so few
# tokens are undecided, or after so many passes without noise
SMALL_MASS, SMALL_COUNT, MAX_NARROWED = 1 / 16, 32, 2


class Search(NamedTuple):
    """Scalars, float32 then int32. largest x; what a kept x satisfies: x >= floor, less than `mass`
    (a sum of exp(x - largest)) and fewer than `count` tokens above it. lo is rejected, hi is kept;
    mass and tokens above each. x, token: the best token above lo, if `known`. The next pass counts
    from `base` on, densest at `guess` of the way to hi, and looks for a candidate if `noisy`.
    narrowed: passes without noise since the last with it. done: token is the row's."""

    largest: Any
    floor: Any
    mass: Any
    lo: Any
    hi: Any
    lo_mass: Any
    hi_mass: Any
    x: Any
    base: Any
    guess: Any
    count: Any
    lo_count: Any
    hi_count: Any
    token: Any
    known: Any
    noisy: Any
    narrowed: Any
    done: Any


FLOATS = Search._fields.index("count")


class Sums(NamedTuple):
    """What a pass finds: tokens and mass above each pivot [PIVOTS], and the best score above the
    first of them with its token."""

    counts: Any
    masses: Any
    score: Any
    token: Any


@jax.jit
def begin(
    largest: Any, total: Any, vocab: Any, top_k: Any, top_p: Any, min_p: Any, token: Any, x: Any
) -> Search:
    """When nothing is known but the largest x, the sum of exp(x - largest) and the best token."""
    greedy = top_k == 1
    by_count, by_mass = ~greedy & (top_k < vocab), ~greedy & (top_p < 1)
    floor = jnp.where(greedy | (min_p <= 0), NONE, largest + jnp.log(min_p))
    counted = by_count | by_mass
    below = floor - jnp.maximum(jnp.abs(floor) * 2.0**-22, 1e-37)
    return _next(
        largest=largest,
        floor=floor,
        mass=jnp.where(by_mass, top_p * total, jnp.inf),
        count=jnp.where(by_count, top_k, NO_ID),
        lo=jnp.where(x >= floor, NONE, below),
        lo_mass=total,
        lo_count=vocab,
        # without top-k and top-p, all from `floor` on is kept; else only the largest is known to be
        hi=jnp.where(counted, largest, jnp.maximum(floor, LOWEST)),
        hi_mass=jnp.where(counted, 0.0, total),
        hi_count=jnp.where(counted, 0, vocab),
        token=token,
        x=x,
        candidate=jnp.bool_(True),
        narrowed=jnp.int32(0),
    )


@jax.jit
def advance(search: Search, sums: Sums, x: Any) -> Search:
    """After a pass over the row. x: of sums.token, if it was looked for."""
    bars = pivots(search)
    enough = (sums.counts >= search.count) | (sums.masses >= search.mass)
    rejected = enough | (bars < search.floor)
    kept = jnp.where(enough, HIGHEST, jnp.maximum(bars, search.floor))
    lowered = kept < search.hi
    noisy = search.noisy != 0
    # what is above a pivot falls with it: lo's is the least of the rejected ones'
    return _next(
        largest=search.largest,
        floor=search.floor,
        mass=search.mass,
        count=search.count,
        lo=jnp.maximum(search.lo, jnp.max(jnp.where(rejected, bars, NONE))),
        lo_mass=jnp.minimum(search.lo_mass, jnp.min(jnp.where(rejected, sums.masses, jnp.inf))),
        lo_count=jnp.minimum(search.lo_count, jnp.min(jnp.where(rejected, sums.counts, NO_ID))),
        hi=jnp.minimum(search.hi, jnp.min(kept)),
        hi_mass=jnp.maximum(search.hi_mass, jnp.max(jnp.where(lowered, sums.masses, 0.0))),
        hi_count=jnp.maximum(search.hi_count, jnp.max(jnp.where(lowered, sums.counts, 0))),
        token=jnp.where(noisy, sums.token, search.token),
        x=jnp.where(noisy, x, search.x),
        candidate=noisy | (search.known != 0),
        narrowed=jnp.where(noisy, 0, search.narrowed + 1),
    )


def _next(
    *, largest, floor, mass, count, lo, lo_mass, lo_count, hi, hi_mass, hi_count, token, x,
    candidate, narrowed,
) -> Search:  # fmt: skip
    """Whether the candidate is the row's token, and else what the next pass does."""
    known = candidate & (x > lo)

    def crossing(at_lo: Any, at_hi: Any, wanted: Any) -> Any:
        """Where between lo and hi the amount above falls to `wanted`, if its log falls evenly."""
        fall = jnp.log(at_lo) - jnp.log(jnp.minimum(at_hi, at_lo * 0.5))
        return (jnp.log(at_lo) - jnp.log(wanted)) / fall

    # the largest x has nothing above it, itself weighs 1: half of that keeps the logs finite
    by_count = crossing(
        jnp.maximum(lo_count.astype(jnp.float32), 1.0),
        jnp.maximum(hi_count.astype(jnp.float32), 0.5),
        count.astype(jnp.float32),
    )
    by_mass = crossing(
        jnp.maximum(lo_mass, 1.0), jnp.maximum(hi_mass, 0.5), jnp.minimum(mass, HIGHEST)
    )
    guess = lax.clamp(0.1, jnp.maximum(by_count, by_mass), 0.9)
    few = lo_count - hi_count <= SMALL_COUNT
    settled = few | (lo_mass - hi_mass <= lo_mass * SMALL_MASS)
    return Search(
        largest=largest,
        floor=floor,
        mass=mass,
        lo=lo,
        hi=hi,
        lo_mass=lo_mass,
        hi_mass=hi_mass,
        x=x,
        base=jnp.where(known, x, lo),
        guess=jnp.where(known, 0.5, guess),
        count=count,
        lo_count=lo_count,
        hi_count=hi_count,
        token=token,
        known=known.astype(jnp.int32),
        noisy=(~known & (settled | (narrowed >= MAX_NARROWED))).astype(jnp.int32),
        narrowed=narrowed,
        done=(candidate & (x >= hi)).astype(jnp.int32),
    )


@jax.jit
def pivots(search: Search) -> Any:
    """[PIVOTS] values of x to count above: base, the guess, and to either side of it a few at 3/4,
    3/16, ... of the way to base and to hi; base again for those that are not before hi."""
    place = jnp.arange(PIVOTS, dtype=jnp.int32) - PIVOTS // 2
    away = jnp.exp2(2.0 * jnp.abs(place).astype(jnp.float32) - (PIVOTS - 2)) * 0.75
    reach = jnp.where(place < 0, -search.guess, 1.0 - search.guess)
    fraction = search.guess + jnp.where(place == 0, 0.0, reach * away)
    x = search.base * (1.0 - fraction) + search.hi * fraction
    inside = (place > -PIVOTS // 2) & (x > search.base) & (x < search.hi)
    return jnp.where(inside, x, search.base)
