"""Which pictures are on the device, in rows of a buffer that extend steps read. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from jaxserve.media.picture import Picture, PromptMedia
from jaxserve.packing.media import Encoding
from jaxserve.packing.sequence import Sequence


@dataclasses.dataclass(eq=False, slots=True)
class _Place:
    """Where a picture is."""

    rows: np.ndarray
    users: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class _Show:
    """The pictures of one admitted sequence."""

    spans: np.ndarray
    """[pictures, 2]: first token, and the one behind the last."""
    places: dict[int, _Place] = dataclasses.field(default_factory=dict)
    """Of those that have tokens to come, by number."""


class Stage:
    """Rows of the device's buffer. A picture gets some before the first step that runs a token in
    its place, and keeps them while such tokens are to come; then until the rows are wanted, in case
    somebody else shows the same picture.

    The device runs steps in order: rows can be given away once the step that reads them last has
    been queued. Not before: all pictures of a step are put there first.
    """

    def __init__(self, rows: int) -> None:
        """rows: of the buffer, enough for the pictures of one whole step; 0 for a model that takes
        none."""
        self._rows = rows
        self._shows: dict[Sequence, _Show] = {}
        self.encoded = 0
        """Pictures put on the device so far."""
        self.reset()

    def reset(self) -> None:
        """Nothing is there: at the start, and after a failure on the device."""
        for sequence in self._shows:
            sequence.media_rows = None
        self._free = np.arange(self._rows, dtype=np.int32)
        self._places: dict[bytes, _Place] = {}  # those used longest ago first
        self._shows.clear()
        self._new: list[Encoding] = []
        self._passed: list[tuple[Sequence, int]] = []
        self.blocked = False
        """Whether some picture has found no room in this step."""

    def forget(self) -> None:
        """Pictures that nobody needs: the next who shows one puts it there anew."""
        for digest in [digest for digest, place in self._places.items() if not place.users]:
            self._drop(digest)

    def begin_step(self) -> None:
        """Before a step is planned: what the one before has passed is free to go."""
        for sequence, number in self._passed:
            show = self._shows.get(sequence)
            if show is not None and number in show.places:
                show.places.pop(number).users -= 1
        self._passed.clear()
        self.blocked = False

    @property
    def patches(self) -> int:
        """P of the pictures that are to be put there before this step."""
        return sum(0 if x.picture.patches is None else len(x.picture.patches) for x in self._new)

    def cover(
        self, sequence: Sequence, start: int, stop: int, most: int, patches: float = math.inf
    ) -> int:
        """Put there what tokens start..stop-1 of an admitted sequence need, as far as there is
        room: how far they can run in this step. Pictures that are seen as a block are not cut:
        before one, or behind it if it begins at `start` and ends by `most`. patches: of this step's
        pictures; one may have more."""
        media = sequence.request.media
        if media is None or not media.pictures:
            return stop
        stop = self._uncut(media, start, stop, most)
        show = self._show(sequence, media)
        for number in self._between(show, start, stop):
            if number in show.places:
                continue
            place = self._find(media.pictures[number], patches)
            if place is None:
                self.blocked = True
                return media.uncut(max(int(show.spans[number, 0]), start))
            place.users += 1
            show.places[number] = place
            assert sequence.media_rows is not None
            mine = media.owners == number
            sequence.media_rows[mine] = place.rows[media.offsets[mine]]
        return stop

    def ran(self, sequence: Sequence, stop: int) -> None:
        """Its tokens before `stop` are in the step, or were in those before."""
        show = self._shows.get(sequence)
        if show is not None:
            self._passed += [(sequence, n) for n in show.places if show.spans[n, 1] <= stop]

    def leave(self, sequence: Sequence) -> None:
        """A sequence gives its slot back."""
        sequence.media_rows = None
        show = self._shows.pop(sequence, None)
        for place in () if show is None else show.places.values():
            place.users -= 1

    def take(self) -> tuple[Encoding, ...]:
        """What is to be put on the device before this step."""
        new, self._new = tuple(self._new), []
        self.encoded += len(new)
        return new

    def _uncut(self, media: PromptMedia, start: int, stop: int, most: int) -> int:
        """Before the block that `stop` would cut, or behind it if it begins at `start`."""
        uncut = media.uncut(stop)
        if uncut > start or uncut == stop:
            return uncut
        end = media.block_end(start)
        self.blocked |= end > most
        return start if end > most else end

    def _show(self, sequence: Sequence, media: PromptMedia) -> _Show:
        show = self._shows.get(sequence)
        if show is None:
            show = self._shows[sequence] = _Show(media.spans())
            sequence.media_rows = np.full(len(media.owners), -1, np.int32)
        return show

    def _between(self, show: _Show, start: int, stop: int) -> Iterable[int]:
        """Numbers of the pictures that have tokens among start..stop-1."""
        firsts, ends = show.spans.T
        return np.flatnonzero((firsts < stop) & (ends > start)).tolist()

    def _find(self, picture: Picture, patches: float) -> _Place | None:
        """Where a picture is or will be before the step; None: there is no room."""
        place = self._places.pop(picture.digest, None)
        if place is None:
            own = 0 if picture.patches is None else len(picture.patches)
            if self._new and self.patches + own > patches:
                return None
            for digest in [d for d, other in self._places.items() if not other.users]:
                if len(self._free) >= picture.tokens:
                    break
                self._drop(digest)
            if len(self._free) < picture.tokens:
                return None
            rows, self._free = np.split(self._free, [picture.tokens])
            place = _Place(rows)
            self._new.append(Encoding(picture, rows))
        self._places[picture.digest] = place
        return place

    def _drop(self, digest: bytes) -> None:
        self._free = np.concatenate([self._free, self._places.pop(digest).rows])
