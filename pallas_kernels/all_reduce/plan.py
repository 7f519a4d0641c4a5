"""How a call is cut into blocks, threads and words of 16 bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.all_reduce.workspace import BLOCKS, MAX_RANKS, region

WORD = 16
"""Bytes that a thread moves at once."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Most blocks of the grid and most threads of a block, a multiple of 128. Given ones also lift
    the limits that leave a call to another implementation."""

    blocks: int = BLOCKS
    threads: int = 512


@dataclasses.dataclass(frozen=True)
class Word:
    """The i-th word of a thread: chunk `chunk` of row `block + slot * grid`."""

    index: int
    slot: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Thread t of block b has of each row b, b + grid, ... the words t, t + threads, ..."""

    ranks: int
    rows: int
    size: int
    """D."""
    dtype: str
    threads: int
    grid: int

    @property
    def row_bytes(self) -> int:
        return 2 * self.size

    @property
    def words(self) -> int:
        """Of a row."""
        return self.row_bytes // WORD

    @property
    def chunks(self) -> int:
        """Words of a row that a thread has."""
        return -(-self.words // self.threads)

    @property
    def slots(self) -> int:
        """Rows that a block has."""
        return -(-self.rows // self.grid)

    @property
    def each(self) -> list[Word]:
        """A thread's words."""
        return [
            Word(slot * self.chunks + chunk, slot, chunk)
            for slot in range(self.slots)
            for chunk in range(self.chunks)
        ]

    @property
    def unit(self) -> int:
        """Bytes of one word of all threads."""
        return WORD * self.threads


def cut(rows: int, size: int, ranks: int, dtype: Any, sizes: Sizes, most: int) -> Plan:
    """The plan with as few words a thread as `sizes` allow. most: words a thread can have. Raises
    NotImplementedError for what the peer kernels cannot do."""
    name = np.dtype(dtype).name
    if jnp.dtype(dtype).itemsize != 2:
        raise NotImplementedError(f"dtype {name}: words of 16 bytes hold eight 16-bit numbers")
    if not 2 <= ranks <= MAX_RANKS:
        raise NotImplementedError(f"{ranks} ranks: peers are 2 to {MAX_RANKS}")
    if rows == 0:
        raise NotImplementedError("no rows, so no blocks to launch")
    if size % 8:
        raise NotImplementedError(f"rows of {size} numbers are no whole words of 8")
    words = size // 8
    chunks = -(-words // sizes.threads)
    threads = -(-words // chunks // 128) * 128  # a Pallas thread is a warpgroup
    plan = Plan(ranks, rows, size, name, threads, min(rows, sizes.blocks))
    if len(plan.each) > most:
        raise NotImplementedError(
            f"{rows} rows of {size} numbers are {len(plan.each)} words a thread, more than {most}"
        )
    return plan


def check_room(plan: Plan, used: int) -> Plan:
    """`plan`, whose blocks use `used` bytes of their boxes, or NotImplementedError."""
    room = region(plan.ranks)
    if used > room:
        raise NotImplementedError(
            f"{plan.rows} rows of {plan.size} numbers take {used} bytes of a block's {room}"
        )
    return plan
