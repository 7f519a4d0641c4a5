"""Which columns of a parameter each tensor of a checkpoint is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from converters.layout import Layout, places
from converters.shards import Bounds, Runs, Shard, Target, same_rows
from converters.tables import Table
from jaxserve.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """One source tensor of a parameter: columns of it.

    The columns of a parameter are all that its axes behind `rows` hold; the tensor has the sections
    `first` to `last` of the layout.
    """

    name: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    """As it is read."""
    stored: tuple[int, ...]
    """As the checkpoint states it: the kernel of a convolution has more axes."""
    rows: tuple[int, ...]
    """The parameter's axes that are no columns."""
    filled: tuple[int, ...]
    """The source's, which may be shorter."""
    columns: tuple[int, ...]
    """The others."""
    transpose: bool
    """[columns, *rows] there, [*rows, *columns] here."""
    layout: Layout
    """Of the parameter's columns."""
    first: int
    """Section with which the tensor begins."""
    last: int
    """Section behind its end."""

    def of(self, parameter: np.ndarray) -> np.ndarray:
        """What is this part's of a parameter: [*rows, columns], as the tensor has them."""
        flat = parameter.reshape(*self.rows, -1)[tuple(map(slice, self.filled))]
        at = places(self.layout, self.first, self.last)
        behind = int(at[0]) + len(at)
        if np.array_equal(at, np.arange(at[0], behind)):
            return flat[..., at[0] : behind]  # without a copy
        return flat[..., at]

    def bias(self) -> Part:
        """What it is of a parameter without rows: a bias, or a scale."""
        columns = self.shape[: 1 if self.transpose else None]
        return dataclasses.replace(
            self, shape=columns, stored=columns, rows=(), filled=(), transpose=False
        )

    def target(self, shard: Shard, array: np.ndarray) -> Target:
        """Where the source goes in a shard of the parameter, of which `array` is the memory."""
        if self.transpose:
            array = array.reshape(len(array), -1).T
        elif not self.rows:
            array = array.reshape(-1)
        return self.turned_target(shard, array)

    def turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of a shard of the parameter with its axes as the source has them."""
        if not self.transpose:
            return shape if self.rows else (math.prod(shape),)
        return (math.prod(shape[1:]), shape[0])

    def turned_target(self, shard: Shard, array: np.ndarray) -> Target:
        """The same for memory with the axes that the source has."""
        if self.rows and not self.transpose:
            return same_rows(shard, array)
        axes = len(self.rows)
        of = self.layout, self.first, self.last
        bounds = zip(shard.bounds[:axes], self.filled, strict=True)
        cut = tuple((min(start, size), min(stop, size)) for (start, stop), size in bounds)
        view = array[(slice(None), *(slice(stop - start) for start, stop in cut))]
        return Target(view, _runs(self.columns, shard.bounds[axes:], *of), cut)


@functools.cache
def _runs(columns: tuple[int, ...], bounds: Bounds, layout: Layout, first: int, last: int) -> Runs:
    """Where a part's columns are among those within `bounds`. All layers ask for the same."""
    numbers = np.arange(math.prod(columns))
    inside = numbers.reshape(columns)[tuple(slice(*bound) for bound in bounds)].reshape(-1)
    own = places(layout, first, last)
    _, rows, at = np.intersect1d(own, inside, assume_unique=True, return_indices=True)
    return tuple(sorted(_stretches(rows.tolist(), at.tolist())))


def _stretches(rows: list[int], at: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Rows that follow each other where they go, and lie equally far apart in the file."""
    start = 0
    while start < len(at):
        step, stop = 1, start + 1
        if stop < len(at) and rows[stop] > rows[start]:
            step = rows[stop] - rows[start]
        while (
            stop < len(at) and at[stop] == at[stop - 1] + 1 and rows[stop] == rows[stop - 1] + step
        ):
            stop += 1
        yield rows[start], at[start], stop - start, step if stop - start > 1 else 1
        start = stop


def filled(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray] | None:
    """Which rows and which columns of a parameter its parts fill, as booleans [rows], [columns];
    None: all of them. The others are zeros."""
    of = parts[0]
    rows, columns = math.prod(of.rows), math.prod(of.columns)
    if sum(math.prod(part.shape) for part in parts) == rows * columns:
        return None
    found = np.zeros(columns, np.bool)
    for part in parts:
        found[places(part.layout, part.first, part.last)] = True
    return np.arange(rows) < math.prod(of.filled), found


def parts_of(path: str, shape: tuple[int, ...], config: ModelConfig, table: Table) -> list[Part]:
    """The source tensors of parameter `path` of `shape`, with the shapes they must have."""
    rule, layer = table.rule(path)
    widths = rule.widths(config) if rule.widths else (shape[-1],)
    groups = rule.groups(config) if rule.groups else 1
    orders = rule.orders(config) if rule.orders else (None,) * len(widths)
    each, apart = len(widths) // len(rule.sources), 1 + bool(rule.padding)
    if rule.padding:
        widths = tuple(size for width in widths for size in (width, rule.padding))
        orders = tuple(each for order in orders for each in (order, None))
    layout = Layout(widths, groups, orders)
    # fused parameters are kernels [in, *out], which are transposed, and biases [*out]
    rows = shape[:1] if rule.transpose else () if rule.widths else shape[:-1]
    theirs = rows if rule.rows is None else (rule.rows,)
    parts = []
    for number, source in enumerate(rule.sources):
        first = number * each * apart
        last = first + each
        width = sum(widths[first:last])
        expected = (width, *theirs) if rule.transpose else (*theirs, width)
        stored = expected if rule.axes is None else (width, *rule.axes)
        fields = (rows, theirs, shape[len(rows) :], rule.transpose, layout, first, last)
        parts.append(Part(source.replace("{i}", layer), expected, stored, *fields))
    return parts
