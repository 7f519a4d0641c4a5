"""The padded sizes that programs are compiled for. No jax."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Container

DECODE_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Where every row costs about the same."""
EXTEND_TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
EXTEND_ROWS = (8, 16, 32, 64, 128)
"""Sequences in one extend step: a row of the LM head each, so they cost little."""
ALIGNMENT = 8
"""Each packed sequence starts at a multiple of this (TMA boxes of the prefill kernel)."""
EARLY_ROWS = (1, *EXTEND_ROWS[:3])
"""Of few rows, those whose kernels are timed before an engine answers, where that is necessary: it
takes seconds for each number of rows. Steps of 2 and 4 rows take 3% longer as steps of 8 (8B; a
quarter at 0.5B), and chains have these numbers of rows, too."""
FIRST_ROWS = 8
"""A few callers' decode steps: on a GPU of 8 rows hardly longer than of one."""
FIRST_TOKENS = 512
"""One caller's usual prompt."""


def padded_length(tokens: int) -> int:
    """Rows that a sequence of `tokens` new tokens takes in a packed batch."""
    return -(-tokens // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The ladder of shapes: `decode` numbers of rows B and `extend` numbers of tokens T."""

    decode: tuple[int, ...]
    extend: tuple[int, ...]

    @classmethod
    def make(cls, max_rows: int, max_tokens: int, decode: tuple[int, ...] = DECODE_ROWS) -> Buckets:
        """Buckets up to `max_rows` running requests, as in `decode`, and `max_tokens` packed
        tokens, the largest of each list being exactly that (tokens rounded up to the
        alignment)."""
        rows = [b for b in decode if b < max_rows] + [max_rows]
        top = padded_length(max_tokens)
        tokens = [t for t in EXTEND_TOKENS if t < top] + [top]
        return cls(tuple(sorted(set(rows))), tuple(tokens))

    @property
    def max_tokens(self) -> int:
        return self.extend[-1]

    @property
    def first(self) -> Buckets:
        """What an engine has when it begins to answer: the largest of each list, which can run
        anything, and one for a few callers."""
        return Buckets(_first(self.decode, FIRST_ROWS), _first(self.extend, FIRST_TOKENS))

    def has_stand_in(self, rows: int) -> bool:
        """Whether a decode step of `rows` rows loses little in a larger bucket, see EARLY_ROWS."""
        return rows not in EARLY_ROWS and any(b > rows and b in EARLY_ROWS for b in self.decode)

    def only(self, decode: Container[int], extend: Container[int]) -> Buckets:
        """Those that are in `decode` and `extend`."""
        return Buckets(
            tuple(b for b in self.decode if b in decode),
            tuple(t for t in self.extend if t in extend),
        )

    def decode_rows(self, rows: int) -> int:
        """The smallest bucket that holds `rows` rows."""
        return self.decode[bisect.bisect_left(self.decode, rows)]

    def extend_tokens(self, tokens: int) -> int:
        """The smallest bucket that holds `tokens` packed tokens."""
        return self.extend[bisect.bisect_left(self.extend, tokens)]

    @staticmethod
    def extend_rows(tokens: int) -> int:
        """Rows B of the extend program of bucket `tokens`: as many as can start there, within
        EXTEND_ROWS."""
        fit = [rows for rows in EXTEND_ROWS if rows * ALIGNMENT <= tokens]
        return fit[-1] if fit else EXTEND_ROWS[0]

    @property
    def max_extend_rows(self) -> int:
        return self.extend_rows(self.max_tokens)


@dataclasses.dataclass(frozen=True)
class Ready:
    """What can run now: an engine answers before all of its programs are compiled. The largest
    bucket of each list is always there, so whatever fits into another one runs."""

    buckets: Buckets
    """Those whose programs are there."""
    several: frozenset[int]
    """Numbers of rows B with a program of several decode steps."""

    @classmethod
    def everything(cls, buckets: Buckets) -> Ready:
        """All of `buckets`."""
        return cls(buckets, frozenset(buckets.decode))


def _first(sizes: tuple[int, ...], enough: int) -> tuple[int, ...]:
    """The largest of `sizes`, ascending, that is at most `enough` (or the smallest), and the
    last."""
    small = max((size for size in sizes if size <= enough), default=sizes[0])
    return tuple(sorted({small, sizes[-1]}))
