"""Pictures into a prompt: its markers become runs of placeholders, and each token gets its owner.

T: tokens of a prompt, expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from jaxserve.errors import InvalidRequestError, ModelLoadError
from jaxserve.media.families.family import Family, Prepared
from jaxserve.media.picture import PromptMedia

WORDS = 8
"""Of a digest, 32 bits each."""
SIGN = np.int32(-(1 << 31))
"""The bit that keys of pictures have, and those of text have not."""

Encode = Callable[[str], Sequence[int]]


class Expander:
    """Of one model. Thread-safe."""

    def __init__(self, family: Family, encode: Encode | None) -> None:
        """encode: token ids of a text, without those that a tokenizer puts around a prompt; None
        without a tokenizer."""
        self._family = family
        self._encode = encode
        self._frames: dict[str, list[int]] = {}

    def text(self, text: str, pictures: Sequence[Prepared]) -> tuple[str, bool]:
        """A prompt's text with the frame of each picture in place of its marker, and whether it has
        them; as it is where it has placeholders, or another number of markers: it is expanded
        already then, or wrong."""
        marker, token = self._family.marker_text, self._family.token_text
        pieces = text.split(marker)
        if len(pieces) - 1 != len(pictures) or (marker != token and token in text):
            return text, False
        frames = [self._family.frame(picture) for picture in pictures]
        return "".join(x for pair in zip(pieces, [*frames, ""], strict=True) for x in pair), True

    def framed(self, ids: Sequence[int], pictures: Sequence[Prepared]) -> list[int]:
        """A prompt's ids with one placeholder a run: markers become frames, and runs that are
        expanded already shrink. Raises InvalidRequestError where the pictures do not fit."""
        array = np.asarray(ids, np.int64)
        units = self._units(array)
        mark_themselves = self._family.marker == self._family.token
        alone = mark_themselves and sum(length for _, length in units) == len(pictures)
        of_run = _of_run(pictures)
        framed: list[int] = []
        copied, run = 0, 0  # what is done of the prompt, and of the pictures' runs
        for start, length in units:
            end = start + max(length, 1)
            framed += array[copied:start].tolist()
            copied = start
            while copied < end:
                if run == len(of_run):
                    self._refuse(len(units), pictures)
                picture = pictures[of_run[run]]
                first = run == 0 or of_run[run - 1] != of_run[run]
                if length and not alone and end - copied >= picture.run:
                    framed.append(self._family.token)
                    copied, run = copied + picture.run, run + 1
                elif first and (mark_themselves or not length):
                    framed += self._frame(picture)
                    copied, run = copied + 1, run + picture.runs
                else:
                    self._refuse(len(units), pictures)
        if run != len(of_run):
            self._refuse(len(units), pictures)
        return framed + array[copied:].tolist()

    def media(
        self, framed: Sequence[int], pictures: Sequence[Prepared]
    ) -> tuple[list[int], PromptMedia]:
        """The prompt's ids with all placeholders, and what they stand for. Raises
        InvalidRequestError where there is not one placeholder for each run."""
        ids = np.asarray(framed, np.int64)
        units = np.flatnonzero(ids == self._family.token)
        of_run = _of_run(pictures)
        if len(units) != len(of_run):
            self._refuse(len(units), pictures)
        lengths = np.ones(len(ids), np.int64)
        lengths[units] = [pictures[n].run for n in of_run]
        owner = np.full(len(ids), -1, np.int32)
        owner[units] = of_run
        expanded, owners = np.repeat(ids, lengths), np.repeat(owner, lengths)
        offsets = np.zeros(len(expanded), np.int32)
        keys = expanded.astype(np.int32)
        for number, picture in enumerate(pictures):
            places = np.flatnonzero(owners == number)
            offsets[places] = np.arange(len(places))
            words = np.frombuffer(picture.picture.digest, "<i4") | SIGN
            keys[places] = words[np.arange(len(places)) % WORDS]
        positions, delta = self._family.places(owners, pictures)
        media = PromptMedia(
            pictures=tuple(picture.picture for picture in pictures),
            owners=owners,
            offsets=offsets,
            keys=keys,
            positions=positions,
            delta=delta,
            reach=self._family.reach(owners),
        )
        return expanded.tolist(), media

    def _frame(self, picture: Prepared) -> list[int]:
        """Ids of a picture's frame."""
        text = self._family.frame(picture)
        if text == self._family.token_text:
            return [self._family.token]
        if self._encode is None:
            raise InvalidRequestError(
                "without a tokenizer (skip_tokenizer_init=True) this model's images need input_ids "
                f"that are expanded already: runs of {picture.run} tokens {self._family.token}"
            )
        if text not in self._frames:
            ids = list(self._encode(text))
            if ids.count(self._family.token) != picture.runs:
                raise ModelLoadError(
                    f"the tokenizer does not write {self._family.token_text!r} as the token "
                    f"{self._family.token} that config.json names"
                )
            self._frames[text] = ids
        return self._frames[text]

    def _units(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Where something stands for pictures: starts and lengths of runs of placeholders, and
        markers that no run follows, of length 0."""
        family = self._family
        inside = np.concatenate(([False], ids == family.token, [False]))
        edges = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2).tolist()
        units = [(start, end - start) for start, end in edges]
        if family.marker != family.token:
            alone = (ids == family.marker) & ~inside[2:]
            units = sorted([*units, *((place, 0) for place in np.flatnonzero(alone).tolist())])
        return units

    def _refuse(self, found: int, pictures: Sequence[Prepared]) -> NoReturn:
        lengths = ", ".join(map(str, sorted({picture.run for picture in pictures})))
        raise InvalidRequestError(
            f"Prompt has {found} image placeholders but {len(pictures)} image inputs were "
            f"provided. (Of these images, placeholders that are expanded already stand in runs of "
            f"{lengths} tokens.)"
        )


def _of_run(pictures: Sequence[Prepared]) -> list[int]:
    """The number of the picture that each run belongs to."""
    return [n for n, picture in enumerate(pictures) for _ in range(picture.runs)]
