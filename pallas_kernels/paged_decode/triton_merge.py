"""Merging what the splits of a row found, for the Triton kernel: where it waits meanwhile, and how
the merging program comes by it.

    Partials   float32 arrays partial [B, splits, N, H] and lse [B, splits, N, COPIES], merged by a
               second launch, or in the same one by whoever finds all others counted in a lock
    Exchange   int32 words of `locks`, which are 0 until written: the last working split reads
               them until none is 0, so neither a fence nor an atomic is waited for

Everything that is merged stays in one layout [rows, splits, width], splits in the middle: Triton
then keeps the splits of one output value in one thread, and nothing crosses warps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.softmax import NEG, TINY
from pallas_kernels.triton_ops import ceil_div, column, plt, row

# words that keep one log-sum-exp: read together by one thread, they make a load that is large
# enough for Triton not to repeat it in every layout that its users want
COPIES = 4
# the bits of -0.0: what a word of 0 is written as, for 0 means "not yet written"
MINUS_ZERO = -(2**31)


@dataclasses.dataclass(frozen=True)
class Group:
    """The query heads of one KV head of a row: heads G, of head_dim H, among kv_heads K; splits
    that share them, of which `at_once` are merged at a time (both powers of two). rows, width: G
    and H rounded up to powers of two."""

    heads: int
    head_dim: int
    kv_heads: int
    splits: int
    at_once: int = 1

    @property
    def rows(self) -> int:
        return pl.next_power_of_2(self.heads)

    @property
    def width(self) -> int:
        return pl.next_power_of_2(self.head_dim)

    def words(self, batch: int) -> int:
        """int32 that an Exchange of `batch` rows takes."""
        return batch * self.kv_heads * self.splits * self.rows * (self.width + COPIES)

    def inside(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """Which of equally shaped (rows, columns) are heads and channels that exist."""
        return (rows < self.heads) & (columns < self.head_dim)


class Partials:
    """One KV head's part of partial [B, splits, N, H] and lse [B, splits, N, COPIES], float32."""

    def __init__(self, group: Group, b: Any, head: Any, partial_ref: Any, lse_ref: Any):
        self.group, self.b, self.first = group, b, head * group.heads
        self.partial_ref, self.lse_ref = partial_ref, lse_ref

    def put(self, split: Any, out: jax.Array, lse: jax.Array) -> None:
        """Write out [n, width] and lse [n] of a split; the first G rows count."""
        for ref, values in ((self.partial_ref, out), (self.lse_ref, column(lse, COPIES))):
            rows, columns = _cells(values.shape)
            at = jnp.full_like(rows, self.b), jnp.full_like(rows, split), self.first + rows, columns
            mask = self.group.inside(rows, columns)
            plt.store(ref.at[at], values, mask=mask)

    def get(self, splits: jax.Array, working: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(out [rows, n, width], lse [rows, n]) of `splits` [n]: 0 and NEG from `working` on."""
        found = []
        # volatile: read from the L2, where the other programs' stores are, not from the L1
        for ref, width, other in (
            (self.lse_ref, COPIES, NEG), (self.partial_ref, self.group.width, 0.0)
        ):  # fmt: skip
            rows, ids, columns = _places(self.group, splits, width)
            at = jnp.full_like(ids, self.b), ids, self.first + rows, columns
            mask = self.group.inside(rows, columns) & (ids < working)
            found.append(plt.load(ref.at[at], mask=mask, other=other, volatile=True))
        lse, out = found
        return out, jnp.max(lse, axis=2)


class Exchange:
    """One KV head's part of words_ref, int32 words that are 0 where nothing was written:
    [B, K, splits, rows, width] for values, then [B, K, splits, rows, COPIES] for log-sum-exps."""

    def __init__(
        self, group: Group, batch: int, b: Any, head: Any, words_ref: Any, interpret: bool
    ):
        self.group, self.words_ref, self.interpret = group, words_ref, interpret
        self.program = (b * group.kv_heads + head) * group.splits
        entries = batch * group.kv_heads * group.splits * group.rows
        # (first word, words a head) of the log-sum-exps and of the values
        self.parts = (entries * group.width, COPIES), (0, group.width)

    def _at(self, start: int, width: int, ids: Any, rows: jax.Array, columns: jax.Array) -> Any:
        """Words in the part that begins at `start` and keeps `width` for each head."""
        return start + ((self.program + ids) * self.group.rows + rows) * width + columns

    def put(self, split: Any, out: jax.Array, lse: jax.Array) -> None:
        """Write out [n, width] and lse [n] of a split; the first G rows count."""
        for part, values in zip(self.parts, (column(lse, COPIES), out), strict=True):
            rows, columns = _cells(values.shape)
            at = self._at(*part, split, rows, columns)
            if self.interpret:  # which writes masked lanes too: not where another split's rows lie
                at = jnp.where(rows < self.group.rows, at, self.words_ref.shape[0])
            mask = self.group.inside(rows, columns)
            plt.store(self.words_ref.at[at], _to_words(values), mask=mask)

    def get(self, splits: jax.Array, working: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(out [rows, n, width], lse [rows, n]) of `splits` [n], once all that are below `working`
        have been written."""
        (lse_view, live), (view, mask) = self._views(splits, working)

        def missing(state):
            # of what `read` returned: Triton may repeat a load, and the repetition see less
            lse, out = state
            return jnp.sum(_zeros(lse) + jnp.sum(_zeros(out), axis=1), axis=0) > 0

        def read(_):
            # volatile: read again each time, from the L2. Each word tells by itself whether it has
            # been written, so the order in which they arrive does not matter
            lse = plt.load(lse_view, mask=live, other=1, volatile=True)
            out = plt.load(view, mask=mask, other=1, volatile=True)
            return jnp.max(lse, axis=2), out

        lse, out = lax.while_loop(missing, read, read(None))
        rows, ids, _ = _places(self.group, splits, 1)
        live = ((rows < self.group.heads) & (ids < working)).reshape(lse.shape)
        lse = jnp.where(live, lax.bitcast_convert_type(lse, jnp.float32), NEG)
        return lax.bitcast_convert_type(out, jnp.float32), lse

    def clear(self, working: jax.Array) -> None:
        """Write 0 where the first `working` splits wrote, all of whom have been got: the sum over
        all words that ended `get` is behind every thread."""
        count = self.group.at_once

        def some(i: Any, _: None) -> None:
            for view, mask in self._views(i * count + jnp.arange(count, dtype=jnp.int32), working):
                plt.store(view, jnp.zeros(mask.shape, jnp.int32), mask=mask)

        if count == self.group.splits:
            some(0, None)
        else:
            lax.fori_loop(0, ceil_div(working, count), some, None)

    def _views(self, splits: jax.Array, working: jax.Array) -> Any:
        """(words, mask) of the log-sum-exps and of the values of `splits`."""
        found = []
        for start, width in self.parts:
            rows, ids, columns = _places(self.group, splits, width)
            view = self.words_ref.at[self._at(start, width, ids, rows, columns)]
            found.append((view, self.group.inside(rows, columns) & (ids < working)))
        return found


def merge(
    group: Group,
    get: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    working: jax.Array,
) -> jax.Array:
    """[rows, width] float32: the attention of the first `working` splits together."""
    count = group.at_once

    def some(i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, lse = get(i * count + jnp.arange(count, dtype=jnp.int32), working)
        top = jnp.max(lse, axis=1)
        weights = jnp.exp2(lse - column(top, count))
        acc = jnp.sum(out * lax.broadcast_in_dim(weights, out.shape, (0, 1)), axis=1)
        return top, jnp.sum(weights, axis=1), acc

    def more(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = some(i)
        new_top = jnp.maximum(top, carry[0])
        new, old = jnp.exp2(top - new_top), jnp.exp2(carry[0] - new_top)
        acc = carry[2] * column(old, group.width) + acc * column(new, group.width)
        return new_top, carry[1] * old + total * new, acc

    if count == group.splits:
        _, total, acc = some(0)
    else:
        start = (
            jnp.full((group.rows,), NEG, jnp.float32),
            jnp.zeros((group.rows,), jnp.float32),
            jnp.zeros((group.rows, group.width), jnp.float32),
        )
        _, total, acc = lax.fori_loop(0, ceil_div(working, count), more, start)
    return acc / column(jnp.maximum(total, TINY), group.width)


def _places(group: Group, splits: jax.Array, width: int) -> Any:
    """(row, split, column) of each value of a [rows, n, width] array."""
    shape = (group.rows, splits.shape[0], width)
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (group.rows, width))
    return tuple(
        lax.broadcast_in_dim(x, shape, (axis,)) for axis, x in enumerate((rows, splits, columns))
    )


def _cells(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(row, column) of each value of a [n, width] array."""
    n, width = shape
    columns = jnp.arange(width, dtype=jnp.int32)
    return column(jnp.arange(n, dtype=jnp.int32), width), row(columns, n)


def _to_words(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits == 0, jnp.int32(MINUS_ZERO), bits)


def _zeros(words: jax.Array) -> jax.Array:
    """How many along axis 1 are 0."""
    return jnp.sum((words == 0).astype(jnp.int32), axis=1)
