"""How the columns of a parameter are made of those of a checkpoint's tensors."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from converters.head_order import Order


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sections of columns, each with a share in every group."""

    widths: tuple[int, ...]
    """Columns of each section."""
    groups: int
    """1: sections lie one behind the other; else so many groups have an equal share of the first
    section, then of the second and so on."""
    orders: tuple[Order | None, ...]
    """The order of columns in each head of a section; None keeps the checkpoint's."""


@functools.cache
def places(layout: Layout, first: int, last: int) -> np.ndarray:
    """Which column of the parameter each row of a tensor is that holds the sections from `first` to
    `last`, one behind the other: [their widths' sum]. All layers ask for the same."""
    columns = np.arange(sum(layout.widths)).reshape(layout.groups, -1)
    found, start = [], 0
    for width, order in zip(layout.widths, layout.orders, strict=True):
        share = width // layout.groups
        own = columns[:, start : start + share].reshape(-1)
        if order is not None:
            theirs = np.empty_like(own).reshape(-1, len(order))
            theirs[:, order] = own.reshape(theirs.shape)
            own = theirs.reshape(-1)
        found.append(own)
        start += share
    return np.concatenate(found[first:last])
