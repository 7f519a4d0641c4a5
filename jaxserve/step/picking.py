"""Rows of a step's arrays that somebody asked for, gathered before they are copied to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.output.extras import Extra
from jaxserve.output.picked import Picked, Places
from jaxserve.packing.batch import Batch, ExtendBatch
from jaxserve.packing.slots import Rows

SIZES = (8, 64, 512, 4096)
"""Rows that a program gathers."""


def gather(lead: int, source: jax.Array, rows: jax.Array) -> tuple[tuple[()], jax.Array]:
    """Rows [N] of `source`, whose first `lead` dimensions count them: [N, ...]."""
    return (), source.reshape(-1, *source.shape[lead:])[rows]


def sizes_below(rows: int) -> list[int]:
    """Of the gathers from an array of `rows` rows; all of them need none."""
    return [size for size in SIZES if size < rows]


def cover(count: int, rows: int) -> list[int]:
    """Sizes of gathers which together have `count` of `rows` rows: few of them, and less than twice
    as many rows, or the smallest. The last may be `rows`: the array itself."""
    sizes, found = [*sizes_below(rows), rows], []
    while count > 0:
        enough = next(size for size in sizes if size >= count)
        if enough == sizes[0] or enough < 2 * count:
            return [*found, enough]
        found.append(max(size for size in sizes if size <= count))
        count -= found[-1]
    return found


def kind(name: str, source: str, size: int) -> str:
    """Of the program that gathers `size` rows of payload `name`; source: the kind of step that has
    them (without what it reports), or "prompt" for packed tokens."""
    return f"pick_{name}_{source}_{size}"


class Picker:
    """Queues the gathers of one engine."""

    def __init__(self, run: Callable[..., Any]) -> None:
        """run: a program, by its key and arguments."""
        self._run = run
        self._known: tuple[Rows, int, int, Mapping[str, Sequence[int]]] | None = None

    def sampled(self, batch: Batch, arrays: Mapping[str, jax.Array]) -> dict[str, Picked]:
        """Of arrays [n, B, ...] by name, rows of requests that read those of all their tokens."""
        source, bucket = _program(batch)
        wanted = self._asked(batch, next(iter(arrays.values())).shape[0]) if arrays else {}
        return {
            name: self._pick(name, source, bucket, array, wanted[name], array.shape[1])
            for name, array in arrays.items()
            if wanted.get(name)
        }

    def prompts(self, batch: ExtendBatch, name: str, array: jax.Array) -> Picked:
        """Of `array` [T, ...], the tokens of prompts that extras read."""
        rows: list[int] = []
        for row in batch.rows:
            for extra in row.sequence.request.extras:
                if extra.name == name and row.leader < 0:
                    positions = extra.prompt_positions(row.start, row.stop)
                    shift = row.packed_start - row.start
                    rows += range(positions.start + shift, positions.stop + shift)
        return self._pick(name, "prompt", batch.tokens, array, rows, 0)

    def ends(
        self, batch: Batch, arrays: Mapping[str, jax.Array], places: Places
    ) -> dict[str, Picked]:
        """Of arrays [n, B, ...] by name, the rows at `places`."""
        source, bucket = _program(batch)
        found = {}
        for name, rows in places.items():
            array, width = arrays[name], arrays[name].shape[1]
            order = sorted(step * width + row for step, row in rows)
            found[name] = self._pick(name, source, bucket, array, order, width)
        return found

    def _asked(self, batch: Batch, steps: int) -> Mapping[str, Sequence[int]]:
        """By name, the rows of [n, B] together that are read, ascending."""
        if isinstance(batch, ExtendBatch):
            return _by_name(
                (number, [e for e in row.sequence.request.extras if e.reads_sample(row.stop)])
                for number, row in enumerate(batch.rows)
                if row.samples
            )
        rows, width = batch.rows, batch.row_bucket
        if self._known is None or self._known[:3] != (rows, width, steps):
            of_one = _by_name(
                (number, [e for e in sequence.request.extras if not e.at_end])
                for number, sequence in enumerate(rows.sequences)
            )
            found = {
                name: [step * width + row for step in range(steps) for row in asking]
                for name, asking in of_one.items()
            }
            self._known = (rows, width, steps, found)
        return self._known[3]

    def _pick(
        self,
        name: str,
        source: str,
        bucket: int,
        array: jax.Array,
        rows: Sequence[int],
        width: int,
    ) -> Picked:
        """rows: ascending. width: see `Picked`."""
        total = array.shape[0] * (width or 1)
        pieces, start = [], 0
        for size in cover(len(rows), total):
            if size == total:
                return Picked((array,), None, width)
            index = np.full(size, rows[-1], np.int32)
            part = rows[start : start + size]
            index[: len(part)] = part
            key = (kind(name, source, size), bucket)
            pieces.append(self._run(key, source=array, rows=index))
            start += size
        return Picked(tuple(pieces), rows, width)


def _program(batch: Batch) -> tuple[str, int]:
    """Kind, without what it reports, and bucket of a batch's step."""
    if isinstance(batch, ExtendBatch):
        return "extend", batch.tokens
    return "decode" if batch.steps == 1 else "decode_many", batch.row_bucket


def _by_name(rows: Iterable[tuple[int, list[Extra[Any]]]]) -> dict[str, list[int]]:
    """The rows that extras read, by the name of the payload. A request has one of a name."""
    found: dict[str, list[int]] = {}
    for row, extras in rows:
        for extra in extras:
            found.setdefault(extra.name, []).append(row)
    return found
