"""Merging what the splits of a row found, for the Triton kernel: where it waits meanwhile, and how
the merging program comes by it.

    Partials   float32 arrays partial [B, splits, N, H] and lse [B, splits, N], merged by a second
               launch, or in the same one by whoever finds all others counted in a lock
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

# float32 values of partial results that a program merges at once: 64 registers a thread, 4 warps
MERGED_AT_ONCE = 8192
# threads of a program at most
ENOUGH = 256
# the bits of -0.0: what a word of 0 is written as, for 0 means "not yet written"
MINUS_ZERO = -(2**31)


@dataclasses.dataclass(frozen=True)
class Group:
    """The query heads of one KV head of a row: heads G, of head_dim H, among kv_heads K; splits
    that share them. rows, width: G and H rounded up to powers of two."""

    heads: int
    head_dim: int
    kv_heads: int
    splits: int

    @property
    def rows(self) -> int:
        return pl.next_power_of_2(self.heads)

    @property
    def width(self) -> int:
        return pl.next_power_of_2(self.head_dim)

    def words(self, batch: int) -> int:
        """int32 that an Exchange of `batch` rows takes."""
        return batch * self.kv_heads * self.splits * self.rows * (self.width + 1)

    def copies(self, splits: jax.Array) -> int:
        """How often to read each log-sum-exp of `splits` [n]: Triton repeats a load of fewer values
        than threads for every layout that its users want, volatile or not."""
        return max(1, ENOUGH // (self.rows * splits.shape[0]))

    def inside(self, rows: jax.Array, columns: jax.Array | None = None) -> jax.Array:
        """Which of equally shaped (rows, columns) are heads and channels that exist."""
        mask = rows < self.heads
        return mask if columns is None else mask & (columns < self.head_dim)


class Partials:
    """One KV head's part of partial [B, splits, N, H] and lse [B, splits, N], float32."""

    def __init__(self, group: Group, b: Any, head: Any, partial_ref: Any, lse_ref: Any):
        self.group, self.b, self.first = group, b, head * group.heads
        self.partial_ref, self.lse_ref = partial_ref, lse_ref

    def put(self, split: Any, out: jax.Array, lse: jax.Array) -> None:
        """Write out [n, width] and lse [n] of a split; the first G rows count."""
        n, width = out.shape
        rows = jnp.arange(n, dtype=jnp.int32)
        columns = row(jnp.arange(width, dtype=jnp.int32), n)
        at = (
            jnp.full((n, width), self.b, jnp.int32), jnp.full((n, width), split, jnp.int32),
            column(self.first + rows, width), columns,
        )  # fmt: skip
        mask = self.group.inside(column(rows, width), columns)
        plt.store(self.partial_ref.at[at], out, mask=mask)
        at = jnp.full_like(rows, self.b), jnp.full_like(rows, split), self.first + rows
        plt.store(self.lse_ref.at[at], lse, mask=self.group.inside(rows))

    def get(self, splits: jax.Array, working: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(out [rows, n, width], lse [rows, n]) of `splits` [n]: 0 and NEG from `working` on."""
        rows, ids, columns = _places(self.group, splits, self.group.width)
        mask = self.group.inside(rows, columns) & (ids < working)
        at = jnp.full_like(ids, self.b), ids, self.first + rows, columns
        rows, ids, _ = _places(self.group, splits, self.group.copies(splits))
        live = self.group.inside(rows) & (ids < working)
        lse_at = jnp.full_like(ids, self.b), ids, self.first + rows
        # volatile: read from the L2, where the other programs' stores are, not from the L1
        lse = plt.load(self.lse_ref.at[lse_at], mask=live, other=NEG, volatile=True)
        out = plt.load(self.partial_ref.at[at], mask=mask, other=0.0, volatile=True)
        return out, jnp.max(lse, axis=2)


class Exchange:
    """One KV head's part of words_ref, int32 words that are 0 where nothing was written:
    [B, K, splits, rows, width] for the values, then [B, K, splits, rows] for the log-sum-exps."""

    def __init__(
        self, group: Group, batch: int, b: Any, head: Any, words_ref: Any, interpret: bool
    ):
        self.group, self.words_ref, self.interpret = group, words_ref, interpret
        self.program = (b * group.kv_heads + head) * group.splits
        self.lse = batch * group.kv_heads * group.splits * group.rows * group.width

    def _at(self, ids: Any, rows: jax.Array, columns: jax.Array | None = None) -> Any:
        entry = (self.program + ids) * self.group.rows + rows
        return self.lse + entry if columns is None else entry * self.group.width + columns

    def put(self, split: Any, out: jax.Array, lse: jax.Array) -> None:
        """Write out [n, width] and lse [n] of a split; the first G rows count."""
        n, width = out.shape
        rows = jnp.arange(n, dtype=jnp.int32)
        wide = column(rows, width), row(jnp.arange(width, dtype=jnp.int32), n)
        for values, place in ((out, wide), (lse, (rows,))):
            at = self._at(split, *place)
            if self.interpret:  # which writes masked lanes too: not where another split's rows lie
                at = jnp.where(place[0] < self.group.rows, at, self.words_ref.shape[0])
            plt.store(self.words_ref.at[at], _to_words(values), mask=self.group.inside(*place))

    def get(self, splits: jax.Array, working: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(out [rows, n, width], lse [rows, n]) of `splits` [n], once all that are below `working`
        have been written; their words are 0 again afterwards."""
        rows, ids, columns = _places(self.group, splits, self.group.width)
        mask = self.group.inside(rows, columns) & (ids < working)
        view = self.words_ref.at[self._at(ids, rows, columns)]
        rows, ids, _ = _places(self.group, splits, self.group.copies(splits))
        live = self.group.inside(rows) & (ids < working)
        lse_view = self.words_ref.at[self._at(ids, rows)]

        def read(_):
            # volatile: read again each time, from the L2. Each word tells by itself whether it has
            # been written, so the order in which they arrive does not matter
            lse = plt.load(lse_view, mask=live, other=1, volatile=True)
            out = plt.load(view, mask=mask, other=1, volatile=True)
            lse = jnp.max(lse, axis=2)
            missing = _zeros(lse) + jnp.sum(_zeros(out), axis=1)
            return lse, out, jnp.sum(missing, axis=0)

        start = (
            jnp.zeros(mask.shape[:2], jnp.int32), jnp.zeros(mask.shape, jnp.int32), jnp.int32(1)
        )  # fmt: skip
        lse, out, _ = lax.while_loop(lambda state: state[2] > 0, read, start)
        # every thread has its words: the sum over all of them is behind us
        plt.store(view, jnp.zeros_like(out), mask=mask)
        plt.store(lse_view, jnp.zeros(live.shape, jnp.int32), mask=live)
        rows, ids, _ = _places(self.group, splits, 1)
        live = (self.group.inside(rows) & (ids < working)).reshape(lse.shape)
        lse = jnp.where(live, lax.bitcast_convert_type(lse, jnp.float32), NEG)
        return lax.bitcast_convert_type(out, jnp.float32), lse


def merge(
    group: Group,
    get: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    working: jax.Array,
) -> jax.Array:
    """[rows, width] float32: the attention of the first `working` splits together."""
    rows, width = group.rows, group.width
    count = max(1, min(group.splits, MERGED_AT_ONCE // (rows * width)))

    def some(i: Any, carry: Any) -> Any:
        out, lse = get(i * count + jnp.arange(count, dtype=jnp.int32), working)
        top = jnp.max(lse, axis=1)
        if carry is not None:
            top = jnp.maximum(top, carry[0])
        weights = jnp.exp2(lse - column(top, count))
        total = jnp.sum(weights, axis=1)
        acc = jnp.sum(out * lax.broadcast_in_dim(weights, out.shape, (0, 1)), axis=1)
        if carry is not None:
            shrink = jnp.exp2(carry[0] - top)
            total = total + carry[1] * shrink
            acc = acc + carry[2] * column(shrink, width)
        return top, total, acc

    carry = some(0, None)
    if count < group.splits:
        carry = lax.fori_loop(1, ceil_div(working, count), some, carry)
    _, total, acc = carry
    return acc / column(jnp.maximum(total, TINY), width)


def _places(group: Group, splits: jax.Array, width: int) -> Any:
    """(row, split, column) of each value of a [rows, n, width] array."""
    shape = (group.rows, splits.shape[0], width)
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (group.rows, width))
    return tuple(
        lax.broadcast_in_dim(x, shape, (axis,)) for axis, x in enumerate((rows, splits, columns))
    )


def _to_words(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits == 0, jnp.int32(MINUS_ZERO), bits)


def _zeros(words: jax.Array) -> jax.Array:
    """How many along axis 1 are 0."""
    return jnp.sum((words == 0).astype(jnp.int32), axis=1)
