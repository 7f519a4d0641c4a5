"""Which evicted pages are in host memory, and what is to be copied. Host only, no jax.

Host memory comes in blocks of several pages, because a page alone is too little to copy. A block
takes what is evicted between two steps, in the order of eviction, and is forgotten as a whole.
Pages are known by their prefix's key (cache.keys), so that nothing here depends on the radix tree:
a page whose predecessors have gone is found again when those come back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """A page in host memory."""

    block: int
    """Number of its block in the pool."""
    index: int
    """Of the page in the block, 0 to C-1."""


class Copies(NamedTuple):
    """What must be copied, in this order, before the next step runs."""

    out: tuple[tuple[int, list[int]], ...] = ()
    """To the host: (block, the pages on the device that fill it, in order)."""
    into: tuple[tuple[int, list[tuple[int, int]]], ...] = ()
    """To the device: (block, [(index in the block, page on the device)])."""


NOTHING = Copies()


def scatter_targets(
    wanted: Sequence[tuple[int, int]], width: int, nowhere: int
) -> Iterator[np.ndarray]:
    """The (index, page) of a block's copies as page numbers [width] int32 by index, `nowhere` for
    none: one array, or more where sequences want the same content in pages of their own."""
    left = list(wanted)
    while left:
        targets, later = np.full(width, nowhere, np.int32), []
        for index, page in left:
            if targets[index] == nowhere:
                targets[index] = page
            else:
                later.append((index, page))
        yield targets
        left = later


class HostPages:
    """What lies in which block of host memory; the least recently used goes for a new one."""

    def __init__(self, num_blocks: int, width: int):
        self.width = width
        """C: pages of a block."""
        self.num_blocks = num_blocks
        """Blocks at most."""
        self.moved_out = 0
        """Pages copied to the host so far."""
        self.moved_in = 0
        """Pages copied from it so far."""
        self._places: dict[bytes, Place] = {}
        self._blocks: OrderedDict[int, list[bytes]] = OrderedDict()  # the least recent one first
        self._free = list(range(num_blocks - 1, -1, -1))
        self._open: int | None = None
        self._out: dict[int, list[int]] = {}
        self._into: dict[int, list[tuple[int, int]]] = {}
        self._loading: dict[int, Place] = {}  # by page

    def __len__(self) -> int:
        """Pages here."""
        return len(self._places)

    def keep(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages that leave the device now, by their keys: those that are not here are copied,
        unless all blocks are about to be read."""
        for key, page in zip(keys, pages, strict=True):
            place = self._places.get(key)
            if place is not None:
                self._blocks.move_to_end(place.block)
                continue
            block = self._block_with_room()
            if block is None:
                continue
            keys_of = self._blocks[block]
            self._places[key] = Place(block, len(keys_of))
            keys_of.append(key)
            self._out[block].append(page)
            self.moved_out += 1

    def find(self, keys: Iterable[bytes], most: int, unit: int = 1) -> list[Place]:
        """Where the pages of `keys` are, up to the first that is not here, and `most`; a multiple
        of `unit`. Their blocks stay until `take`."""
        found: list[Place] = []
        for key in keys:
            place = self._places.get(key) if len(found) < most else None
            if place is None:
                break
            found.append(place)
        del found[len(found) - len(found) % unit :]
        for block, _ in reversed(found):  # a prefix without its beginning is of no use
            self._blocks.move_to_end(block)
            self._into.setdefault(block, [])
        return found

    def load(self, places: Sequence[Place], pages: Sequence[int]) -> None:
        """Copy what `find` has found into `pages` of the device. One that was to be filled before,
        and has changed hands since, is filled once."""
        for place, page in zip(places, pages, strict=True):
            former = self._loading.get(page)
            if former is not None:
                self._into[former.block].remove((former.index, page))
            self._loading[page] = place
            self._into[place.block].append((place.index, page))
        self.moved_in += len(places)

    def take(self) -> Copies:
        """What is to be copied before the next step; the caller does it."""
        if not (self._out or self._into):
            return NOTHING
        into = tuple((block, wanted) for block, wanted in self._into.items() if wanted)
        copies = Copies(tuple(self._out.items()), into)
        self._forget_copies()
        return copies

    def clear(self) -> None:
        """Forget everything, copies that have not been made too."""
        self._places.clear()
        self._blocks.clear()
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._forget_copies()

    def _forget_copies(self) -> None:
        self._out, self._into, self._loading, self._open = {}, {}, {}, None

    def _block_with_room(self) -> int | None:
        """The block that takes the next page; None if every one is about to be read."""
        block = self._open
        if block is not None and len(self._blocks[block]) < self.width:
            return block
        if self._free:
            block = self._free.pop()
        else:
            block = next((b for b in self._blocks if b not in self._into), None)
            if block is None:
                return None
            for key in self._blocks.pop(block):
                del self._places[key]
        self._blocks[block], self._out[block], self._open = [], [], block
        return block
