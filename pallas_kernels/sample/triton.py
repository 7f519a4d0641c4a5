"""The sampler, Pallas on the Triton backend: no sort, no host, one or two reads of the logits.

draw    grid (chunks, B): penalties, biases, then everything that needs no threshold; one read
refine  grid (programs,), `rounds` launches: one more read of the rows that are undecided
finish  grid (B,): whatever is still undecided, then logprobs and results

A tile [2, lanes] is two runs of tokens, HALF apart: a threefry call serves such a pair.

    row of logits  |--lanes--|         ...       |--lanes--|         ...      |  block of 2*HALF
                        |  counters c0 .. c0+lanes   |
                        +---- threefry(key, c) ------+
                        | word 0                     | word 1

    draw, a chunk (some tiles) of one row:
        rows with penalties or biases: logits -> changed, in memory; barrier
        tile: logits -> clean -> x = scaled -> running max, sum of exp(x - max)       (registers)
              x + noise -> best score and its token, in tiles that may have a better one
        (greedy rows that report nothing: the best of each lane, and of these the best at the end)
        rows that report them: the `num_top` best tokens, each by one more walk (L1 hits)
        results of the chunk --> memory, barrier, lock += 1; the last of a row begins its search

    refine, undecided rows shared out evenly, be it one or all:
        done      1 1 0 1 1 1 0 1       programs 0 .. c-1: the first undecided row,
        undecided     0       1         c .. 2c-1: the second, ...; the others exit
        results of the chunk --> memory, barrier, lock += 1; the last of a row advances its search

The search is that of search.py. Rows without filters, or greedy, are decided by draw; with top_p or
top_k nearly all need a pass, a few of them up to four.
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
from pallas_kernels.sample import noise, search
from pallas_kernels.sample.api import Drawn, SampleRows, SlotLists
from pallas_kernels.sample.search import FLOATS, LOWEST, NO_ID, NONE, PIVOTS, Search, Sums
from pallas_kernels.sample.tiles import (
    Best,
    Inputs,
    at_ids,
    barrier,
    better,
    better_noisy,
    change_logits,
    clean,
    exp,
    first_ids,
    load_tile,
    nobody,
    scale,
    smallest_best,
    those_after,
    token_ids,
)
from pallas_kernels.triton_ops import plt
from pallas_kernels.tuning import tuned

LOCK = len(Search._fields) - FLOATS - 1  # column of _Memory.ints


@dataclasses.dataclass(frozen=True)
class Sizes:
    """lanes: half of a tile's tokens, a power of two up to noise.HALF. programs: what a grid aims
    at, by default as many as an H100 holds at once. num_warps: of a program. Those without prefix
    are draw's. rounds: launches of refine."""

    lanes: int = 256
    programs: int = 2560
    num_warps: int = 1
    rounds: int = 4
    refine_lanes: int = 256
    refine_programs: int = 660
    refine_warps: int = 4
    finish_lanes: int = 256
    finish_warps: int = 4


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any."""
    return dataclasses.replace(Sizes(), **tuned(device, "sample", "triton", features))


class _Partials(NamedTuple):
    """What draw's programs find, [B, chunks]: largest cleaned logit, sum of exp(x - scaled
    largest), sum of exp(logit - largest) if logprobs are raw, best score and its token; and
    [B, chunks * top] the best reported values and their tokens (NONE, NO_ID beyond them)."""

    largest: Any
    total: Any
    raw_total: Any
    score: Any
    token: Any
    top_values: Any
    top_ids: Any


class _Memory(NamedTuple):
    """Of the search, from launch to launch: ints [B, LOCK + 1] and floats [B, FLOATS] are Search's
    but for `done`, in whose place is the lock, 0 between launches."""

    ints: Any
    floats: Any


# -- programs that work together ------------------------------------------------------------------


def _last_of(memory: _Memory, b: Any, programs: Any, interpret: bool) -> Any:
    """Whether this is the last of a row's programs to come here; it sees what the others stored.
    The barrier orders every thread's stores before the one thread's atomic, which releases them to,
    and acquires them from, the other programs. Interpreted programs run in sequence."""
    barrier(interpret)
    lock = b, jnp.int32(LOCK)
    last = plt.atomic_add(memory.ints, lock, jnp.int32(1)) == programs - 1
    pl.when(last)(lambda: plt.store(memory.ints.at[lock], jnp.int32(0)))
    return last


def _load_chunks(ref: Any, b: Any, chunks: Any, other: Any) -> Any:
    """What a row's first `chunks` programs wrote, padded with `other` to a power of two. volatile:
    from the L2, where the stores of programs elsewhere are, not from the L1."""
    ids = first_ids(ref.shape[1])[0]
    return plt.load(at_ids(ref, b, ids), mask=ids < chunks, other=other, volatile=True)


def _load_x(logits: Any, b: Any, token: Any, inverse: Any) -> Any:
    return scale(clean(plt.load(logits.at[b, token], volatile=True)), inverse)


def _store_search(memory: _Memory, done: Any, b: Any, found: Search) -> None:
    for i, value in enumerate(found[:FLOATS]):
        memory.floats[b, i] = value
    for i, value in enumerate(found[FLOATS:-1]):
        memory.ints[b, i] = value
    done[b] = found.done


def _load_search(memory: _Memory, done: Any, b: Any) -> Search:
    floats = [memory.floats[b, i] for i in range(FLOATS)]
    ints = [memory.ints[b, i] for i in range(LOCK)]
    return Search._make([*floats, *ints, done[b]])


# -- draw -----------------------------------------------------------------------------------------


def _draw_kernel(
    logits_in, ints_in, refs, logits, memory, done, reported, parts, *, lanes, tiles, per_chunk,
    chunks, top, raw, interpret,
):  # fmt: skip
    del logits_in, ints_in  # they go in and out
    rows = refs.rows
    chunk, b = pl.program_id(0), pl.program_id(1)
    begin = chunk * per_chunk
    end = jnp.minimum(begin + per_chunk, tiles)

    def run():
        inverse, greedy = refs.inverse[b], rows.top_k[b] == 1
        change_logits(logits, refs, b, begin, end, lanes, interpret)

        def tile(i, carry):
            largest, total, raw_total, best = carry
            ids = token_ids(i, lanes)
            cleaned, x = load_tile(logits, b, ids, inverse)
            new = jnp.maximum(largest, jnp.max(cleaned))
            most = scale(new, inverse)
            weight = exp(x - most)
            total = total * exp(scale(largest, inverse) - most) + jnp.sum(weight, axis=0)
            if raw:
                cleaned = jnp.where(ids < logits.shape[1], cleaned, NONE)
                raw_total = raw_total * exp(largest - new) + jnp.sum(exp(cleaned - new), axis=0)
            best = better_noisy(best, refs, b, i, x, weight, most, greedy)
            return new, total, raw_total, best

        def everything():
            zeros = jnp.zeros((lanes,), jnp.float32)
            start = jnp.float32(LOWEST), zeros, zeros if raw else None, nobody()
            largest, total, raw_total, best = lax.fori_loop(begin, end, tile, start)
            return largest, jnp.sum(total), jnp.sum(raw_total) if raw else None, best

        def argmax():
            """All that a greedy row without logprobs needs, with one reduction after the last tile;
            nobody looks at its sums."""

            def look(i, carry):
                most, where = carry
                ids = token_ids(i, lanes)
                _, x = load_tile(logits, b, ids, inverse)
                return jnp.maximum(most, x), jnp.where(x > most, ids, where)

            start = jnp.full((2, lanes), NONE), jnp.full((2, lanes), NO_ID, jnp.int32)
            best = smallest_best(*lax.fori_loop(begin, end, look, start))
            return best[0], best[0], best[0] if raw else None, best

        only_argmax = greedy & (rows.wants_logprob[b] == 0)
        largest, total, raw_total, best = lax.cond(only_argmax, argmax, everything)
        parts.largest[b, chunk] = largest
        parts.total[b, chunk] = total
        parts.score[b, chunk], parts.token[b, chunk] = best
        if raw:
            parts.raw_total[b, chunk] = raw_total
        if top:
            store_top(inverse)
        pl.when(_last_of(memory, b, chunks, interpret))(functools.partial(merge, inverse))

    def store_top(inverse):
        count = jnp.where(rows.wants_logprob[b] > 0, jnp.minimum(rows.num_top[b], top), 0)

        def pick(j, last):
            def walk(i, best):
                ids = token_ids(i, lanes)
                cleaned, x = load_tile(logits, b, ids, inverse)
                if raw:
                    x = jnp.where(ids < logits.shape[1], cleaned, NONE)
                return better(best, those_after(x, ids, last), ids)

            best = lax.fori_loop(begin, end, walk, nobody())
            at = chunk * top + j
            parts.top_values[b, at], parts.top_ids[b, at] = best
            return best

        lax.fori_loop(0, count, pick, (jnp.float32(jnp.inf), jnp.int32(-1)))

    def merge(inverse):
        largest = _load_chunks(parts.largest, b, chunks, LOWEST)
        most = jnp.max(largest)
        scaled = scale(most, inverse)
        total = _load_chunks(parts.total, b, chunks, 0.0)
        total = jnp.sum(total * exp(scale(largest, inverse) - scaled))
        reported[b, 0], reported[b, 1] = scaled, total
        if raw:
            raw_total = _load_chunks(parts.raw_total, b, chunks, 0.0) * exp(largest - most)
            reported[b, 0], reported[b, 1] = most, jnp.sum(raw_total)
        score = _load_chunks(parts.score, b, chunks, NONE)
        _, token = smallest_best(score, _load_chunks(parts.token, b, chunks, NO_ID))
        begun = search.begin(
            scaled, total, jnp.int32(logits.shape[1]), rows.top_k[b], rows.top_p[b],
            rows.min_p[b], token, _load_x(logits, b, token, inverse),
        )  # fmt: skip
        _store_search(memory, done, b, begun)

    live = rows.live[b] != 0
    pl.when(live)(run)
    pl.when(~live & (chunk == 0))(lambda: plt.store(done.at[b], jnp.int32(1)))


# -- refine ---------------------------------------------------------------------------------------


def _pass(
    logits: Any, refs: Inputs, b: Any, found: Search, begin: Any, end: Any, lanes: int
) -> Sums:
    """What search.advance wants to know, of the tokens of tiles [begin, end)."""
    inverse = refs.inverse[b]
    cube = (PIVOTS, 2, lanes)
    bars = lax.broadcast_in_dim(search.pivots(found), cube, (0,))

    def tile(i, carry):
        counts, masses, best = carry
        _, x = load_tile(logits, b, token_ids(i, lanes), inverse)
        weight = exp(x - found.largest)
        above = lax.broadcast_in_dim(x, cube, (1, 2)) > bars
        counts += jnp.sum(above.astype(jnp.int32), axis=1)
        masses += jnp.sum(jnp.where(above, lax.broadcast_in_dim(weight, cube, (1, 2)), 0.0), axis=1)

        def look() -> Best:
            candidate = x > found.base
            return lax.cond(
                jnp.max(candidate.astype(jnp.int32)) > 0,
                lambda: better_noisy(
                    best, refs, b, i, jnp.where(candidate, x, NONE),
                    jnp.where(candidate, weight, 0.0), found.largest, None,
                ),
                lambda: best,
            )  # fmt: skip

        return counts, masses, lax.cond(found.noisy != 0, look, lambda: best)

    zeros = jnp.zeros((PIVOTS, lanes), jnp.int32)
    start = zeros, zeros.astype(jnp.float32), nobody()
    counts, masses, best = lax.fori_loop(begin, end, tile, start)
    return Sums(jnp.sum(counts, axis=1), jnp.sum(masses, axis=1), *best)


def _advance(logits: Any, refs: Inputs, b: Any, found: Search, sums: Sums) -> Search:
    token = jnp.minimum(sums.token, logits.shape[1] - 1)  # NO_ID after a pass without noise
    x = _load_x(logits, b, token, refs.inverse[b])
    return search.advance(found, sums._replace(token=token), x)


def _of_pivots(ref: Any, b: Any, chunks: Any) -> Any:
    """View [PIVOTS, n] of what n chunks of row b have for each pivot."""
    shape = (PIVOTS, *chunks.shape)
    place = lax.broadcasted_iota(jnp.int32, shape, 0)
    return ref.at[jnp.full_like(place, b), place, lax.broadcast_in_dim(chunks, shape, (1,))]


def _refine_kernel(
    memory_in, logits, refs, before, memory, done, parts, *, lanes, tiles, fixed_split, interpret
):  # fmt: skip
    del memory_in  # goes in and out
    program, programs, batch = pl.program_id(0), pl.num_programs(0), logits.shape[0]
    rows, inside = first_ids(batch)
    decided = plt.load(before.at[rows], mask=inside, other=1)
    rank = jnp.cumsum(1 - decided)
    count = jnp.max(rank)
    # with a fixed split one row's share is what it would be if all were undecided
    share = lax.div(programs, batch if fixed_split else jnp.maximum(count, 1))
    per_chunk = lax.div(tiles + share - 1, share)
    chunks = lax.div(tiles + per_chunk - 1, per_chunk)

    def run():
        nth = lax.div(program, chunks)
        chunk = program - nth * chunks
        b = jnp.min(jnp.where((rank == nth + 1) & (decided == 0), rows, NO_ID))
        found = _load_search(memory, before, b)
        begin = chunk * per_chunk
        end = jnp.minimum(begin + per_chunk, tiles)
        sums = _pass(logits, refs, b, found, begin, end, lanes)
        here = lax.broadcast(chunk, (1,))
        plt.store(_of_pivots(parts.counts, b, here), sums.counts[:, None])
        plt.store(_of_pivots(parts.masses, b, here), sums.masses[:, None])
        parts.score[b, chunk], parts.token[b, chunk] = sums.score, sums.token

        def merge():
            ids, _ = first_ids(parts.score.shape[1])
            mask = lax.broadcast(ids < chunks, (PIVOTS,))
            counts = plt.load(_of_pivots(parts.counts, b, ids), mask=mask, other=0, volatile=True)
            masses = plt.load(_of_pivots(parts.masses, b, ids), mask=mask, other=0.0, volatile=True)
            score = _load_chunks(parts.score, b, chunks, NONE)
            best = smallest_best(score, _load_chunks(parts.token, b, chunks, NO_ID))
            merged = Sums(jnp.sum(counts, axis=1), jnp.sum(masses, axis=1), *best)
            _store_search(memory, done, b, _advance(logits, refs, b, found, merged))

        pl.when(_last_of(memory, b, chunks, interpret))(merge)

    pl.when(program < count * chunks)(run)
    # an undecided row gets its own from the last of its programs
    keep = inside & (decided != 0)
    pl.when(program == 0)(lambda: plt.store(done.at[rows], decided, mask=keep))


# -- finish ---------------------------------------------------------------------------------------


def _finish_kernel(
    logits, refs, memory, done, reported, parts, out, *, lanes, tiles, chunks, top, raw
):
    b = pl.program_id(0)
    live = refs.rows.live[b] != 0
    wants = live & (refs.rows.wants_logprob[b] != 0)

    def run():
        def step(found: Search) -> Search:
            sums = _pass(logits, refs, b, found, jnp.int32(0), jnp.int32(tiles), lanes)
            return _advance(logits, refs, b, found, sums)

        start = _load_search(memory, done, b)
        token = lax.while_loop(lambda found: found.done == 0, step, start).token
        out.tokens[b] = token
        pl.when(wants)(lambda: report(token))

    def report(token):
        most, log_sum = reported[b, 0], jnp.log(reported[b, 1])

        def logprob(x: Any) -> Any:
            return jnp.maximum(x - most - log_sum, LOWEST)

        def at(ids: Any) -> Any:
            return logprob(load_tile(logits, b, ids, refs.inverse[b])[0 if raw else 1])

        out.logprob[b] = at(token)
        if out.named is not None:
            ids, inside = first_ids(out.named.shape[1])
            asked = ids < refs.rows.num_named[b]
            view = at_ids(refs.slots.named_ids, refs.rows.slot[b], ids)
            values = at(plt.load(view, mask=asked & inside, other=0))
            plt.store(at_ids(out.named, b, ids), values, mask=inside)
        if top:
            report_top(logprob)

    def report_top(logprob):
        """Each chunk's list falls: the best of their heads comes next, and its list moves on."""
        count = jnp.minimum(refs.rows.num_top[b], top)
        lists, inside = first_ids(chunks)

        def head(ref: Any, at: Any, mask: Any, other: Any) -> Any:
            return plt.load(at_ids(ref, b, lists * top + at), mask=mask & (at < count), other=other)

        def pick(j, heads):
            at, values, ids = heads
            value, i = smallest_best(values, ids)
            found = value > NONE
            out.top_values[b, j] = jnp.where(found, logprob(value), 0.0)
            out.top_ids[b, j] = jnp.where(found, i, 0)
            taken = inside & (ids == i)
            at += taken.astype(jnp.int32)
            values = jnp.where(taken, head(parts.top_values, at, taken, NONE), values)
            return at, values, jnp.where(taken, head(parts.top_ids, at, taken, NO_ID), ids)

        first = jnp.zeros_like(lists)
        heads = [
            head(parts.top_values, first, inside, NONE),
            head(parts.top_ids, first, inside, NO_ID),
        ]
        lax.fori_loop(0, count, pick, (first, *heads))
        columns, some = first_ids(top)
        for array in (out.top_values, out.top_ids):
            rest = jnp.zeros(columns.shape, array.dtype)
            plt.store(at_ids(array, b, columns), rest, mask=some & (columns >= count))

    def silence():
        """What nobody asked for is still finite."""
        out.logprob[b] = jnp.float32(0.0)
        for array in (out.named, out.top_values, out.top_ids):
            if array is not None:
                ids, inside = first_ids(array.shape[1])
                plt.store(at_ids(array, b, ids), jnp.zeros(ids.shape, array.dtype), mask=inside)

    pl.when(~wants)(silence)
    pl.when(live)(run)
    pl.when(~live)(lambda: plt.store(out.tokens.at[b], jnp.int32(0)))


# -- launches -------------------------------------------------------------------------------------


def sample(
    logits: jax.Array,
    rows: SampleRows,
    slots: SlotLists,
    *,
    top: int,
    raw_logprobs: bool,
    fixed_split: bool = False,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> Drawn:
    """See pallas_kernels.sample. Rows with penalties or biases are changed in the logits' own
    memory: if the caller's program needs that afterwards, or may not overwrite it, XLA copies it
    first. interpret: run on any backend, slowly."""
    batch, vocab = logits.shape
    if sizes is None:
        sizes = default_sizes(current_device(), {"batch": batch, "vocab": vocab})
    counters = noise.counter_count(vocab)
    tiles = pl.cdiv(counters, sizes.lanes)
    per_chunk = pl.cdiv(tiles, max(1, sizes.programs // batch))
    chunks = pl.cdiv(tiles, per_chunk)
    refine_tiles = pl.cdiv(counters, sizes.refine_lanes)
    programs = max(sizes.refine_programs, batch)
    most = min(refine_tiles, programs)  # chunks of refine, when one row is undecided
    width = slots.named_ids.shape[1]
    inputs = Inputs(
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
    memory = _Memory(ints(LOCK + 1), floats(FLOATS))
    draw = call(
        functools.partial(
            _draw_kernel, lanes=sizes.lanes, tiles=tiles, per_chunk=per_chunk, chunks=chunks,
            top=top, raw=raw_logprobs, interpret=interpret,
        ),
        name="sample_draw",
        grid=(chunks, batch),
        out_shape=(floats(vocab), memory, ints(), floats(2), _Partials(
            largest=floats(chunks),
            total=floats(chunks),
            raw_total=floats(chunks) if raw_logprobs else None,
            score=floats(chunks),
            token=ints(chunks),
            top_values=floats(chunks * top) if top else None,
            top_ids=ints(chunks * top) if top else None,
        )),
        num_warps=sizes.num_warps,
        aliases={0: 0, 1: 1},
    )  # fmt: skip
    refine = jax.jit(call(  # jitted: traced and lowered once for all rounds
        functools.partial(
            _refine_kernel, lanes=sizes.refine_lanes, tiles=refine_tiles, fixed_split=fixed_split,
            interpret=interpret,
        ),
        name="sample_refine",
        grid=(programs,),
        out_shape=(memory, ints(), Sums(
            ints(PIVOTS, most), floats(PIVOTS, most), floats(most), ints(most)
        )),
        num_warps=sizes.refine_warps,
        aliases={0: 0, 1: 1},
    ))  # fmt: skip
    finish = call(
        functools.partial(
            _finish_kernel, lanes=sizes.finish_lanes, tiles=pl.cdiv(counters, sizes.finish_lanes),
            chunks=chunks, top=top, raw=raw_logprobs,
        ),
        name="sample_finish",
        grid=(batch,),
        out_shape=[Drawn(
            tokens=ints(),
            logprob=floats(),
            top_values=floats(top) if top else None,
            top_ids=ints(top) if top else None,
            named=floats(width) if width else None,
        )],
        num_warps=sizes.finish_warps,
    )  # fmt: skip

    unlocked = jnp.zeros(memory.ints.shape, jnp.int32)
    logits, memory, done, reported, parts = draw(logits, unlocked, inputs)
    for _ in range(sizes.rounds):
        memory, done, _ = refine(memory, logits, inputs, done)
    (found,) = finish(logits, inputs, memory, done, reported, parts)
    return Drawn(
        found.tokens,
        found.logprob,
        jnp.zeros((batch, top)) if found.top_values is None else found.top_values,
        jnp.zeros((batch, top), jnp.int32) if found.top_ids is None else found.top_ids,
        jnp.zeros((batch, width)) if found.named is None else found.named,
    )
