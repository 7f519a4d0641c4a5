"""The sequences that decode. No jax."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxserve.packing.sequence import Sequence
from jaxserve.packing.slots import Rows, Slots


class Running:
    """Sequences whose prompts have run, in the order of a batch's rows."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._sequences: dict[Sequence, None] = {}
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def rows(self) -> Rows:
        """As the rows of a decode step; the same object as long as none comes or goes."""
        if self._rows is None:
            self._rows = self._slots.rows(tuple(self._sequences))
        return self._rows

    def join(self, sequence: Sequence) -> None:
        self._sequences[sequence] = None
        self._rows = None

    def leave(self, sequence: Sequence) -> None:
        del self._sequences[sequence]
        self._rows = None

    def clear(self) -> None:
        self._sequences.clear()
        self._rows = None

    def drop_complete(self, most: int) -> int:
        """Take those out whose last token is scheduled. How many tokens at least, up to `most`, the
        others have to go."""
        rows = self.rows
        left = rows.limit - self._slots.most_scheduled.take(rows.slots)
        least = left.min(initial=most)
        if least > 0:
            return least
        complete = left <= 0
        for row in np.flatnonzero(complete).tolist():
            self.leave(rows.sequences[row])
        return left[~complete].min(initial=most)
