"""What an extend step is told of tokens in whose place pictures stand: fields of its vector, and
how pictures are packed for their tower. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import numpy as np

from jaxserve.media.picture import Picture
from jaxserve.packing.layout import TokenField
from jaxserve.packing.sequence import Sequence


class Encoding(NamedTuple):
    """A picture that is put on the device before a step."""

    picture: Picture
    rows: np.ndarray
    """[tokens] int32: where, in the device's buffer."""


def _media(sequence: Sequence, start: int, stop: int) -> Any:
    rows = sequence.media_rows
    return 0 if rows is None else _padded(rows[start:stop] + 1, stop - start)


def _positions(sequence: Sequence, start: int, stop: int) -> Any:
    places = np.arange(start, stop, dtype=np.int32)
    media = sequence.request.media
    if media is None or media.positions is None:
        return places
    given = media.positions[:, start:stop]
    generated = places[given.shape[1] :] + np.int32(media.delta)
    return np.concatenate([given, np.broadcast_to(generated, (3, len(generated)))], axis=1)


def _reach(sequence: Sequence, start: int, stop: int) -> Any:
    places = np.arange(start, stop, dtype=np.int32)
    media = sequence.request.media
    if media is not None and media.reach is not None:
        given = media.reach[start:stop]
        places[: len(given)] = given
    return places


def _padded(values: np.ndarray, count: int) -> np.ndarray:
    """With zeros behind, for generated tokens that run again."""
    return np.pad(values, (0, count - len(values)))


MEDIA = TokenField("media", _media)
"""Of each token 1 + its row in the device's buffer of pictures; 0 for text."""
POSITIONS = TokenField("positions", _positions, lead=(3,))
"""Time, row and column by which it is rotated."""
REACH = TokenField("reach", _reach)
"""The last position that it sees."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Run:
    """Pictures packed side by side, for one run of a tower."""

    pictures: tuple[Picture, ...]
    rows: np.ndarray
    """[tokens of all] int32."""

    @property
    def patches(self) -> int:
        """P of all of them."""
        return sum(len(picture.patches) for picture in self.pictures if picture.patches is not None)

    @property
    def normalized(self) -> bool:
        """Whether their patches are float32."""
        first = self.pictures[0].patches
        return first is not None and first.dtype != np.uint8


def pack_runs(encodings: Many[Encoding], most: int) -> tuple[Run, ...]:
    """Pictures with patches, as they come, at most `most` patches in a run that has several. Those
    of one run have patches of one dtype."""
    runs: list[list[Encoding]] = []
    size, dtype = 0, None
    for encoding in encodings:
        patches = encoding.picture.patches
        if patches is None:
            continue
        size += len(patches)
        if not runs or size > most or patches.dtype != dtype:
            runs.append([])
            size, dtype = len(patches), patches.dtype
        runs[-1].append(encoding)
    return tuple(
        Run(tuple([each.picture for each in run]), np.concatenate([each.rows for each in run]))
        for run in runs
    )
