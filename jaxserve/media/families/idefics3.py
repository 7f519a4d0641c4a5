"""Idefics3 and SmolVLM: a picture in square tiles, row by row, and the whole of it in one more.

Source: transformers' Idefics3ImageProcessorPil and Idefics3Processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.media.families.family import COMMON, Prepared
from jaxserve.media.families.squares import Squares

if TYPE_CHECKING:
    from PIL.Image import Image

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
LARGEST = 4096
"""Pixels of a side, whatever the files say."""


class Idefics3(Squares):
    """A token is a square of scale x scale patches of one tile."""

    known = (*COMMON, "do_image_splitting", "do_pad", "max_image_size")
    marker_text = token_text = "<image>"
    resample = 1

    def __init__(
        self, config: Mapping[str, Any], files: Mapping[str, Any] | None, given: Mapping[str, Any]
    ) -> None:
        super().__init__(config, files, given)
        scale = self.config.integer("scale_factor", default=2, high=64)
        self._run = (self.patches_a_side // scale) ** 2
        self._split = self.settings.flag("do_image_splitting", True)
        size = self.settings.within("size")
        self._longest = size.integer("longest_edge", default=4 * self.side, high=LARGEST)
        tile = self.settings.within("max_image_size")
        self.check_side("max_image_size", tile.integer("longest_edge", default=self.side))

    @property
    def fixed_run(self) -> int:
        return self._run

    @property
    def most_squares(self) -> int:
        return math.ceil(self._longest / self.side) ** 2 + 1 if self._split else 1

    def prepare(self, image: Image) -> Prepared:
        image = image.resize(self._bounded(*image.size), self._filter)
        side, rows, columns = self.side, 0, 0
        tiles: list[Image] = []
        if self._split:
            image = image.resize(self._multiples(*image.size), self._filter)
            if max(image.size) > side:
                columns, rows = image.width // side, image.height // side
                tiles = [
                    image.crop((left, top, left + side, top + side))
                    for top in range(0, rows * side, side)
                    for left in range(0, columns * side, side)
                ]
        tiles.append(image.resize((side, side), self._filter))
        return Prepared(self.of_images(tiles), len(tiles), (rows, columns))

    def of_output(self, output: Mapping[str, Any]) -> list[Prepared]:
        """Each tile is a picture of its own: which ones are one image's is not said."""
        squares = self.squares(output.get("pixel_values"))
        mask = output.get("pixel_attention_mask")
        if mask is not None:  # tiles that only fill a batch up
            kept = np.asarray(mask).reshape(len(squares), -1).any(axis=1)
            squares = squares[kept]
        return [Prepared(self.of_values(square[None])) for square in squares]

    def frame(self, prepared: Prepared) -> str:
        rows, columns = prepared.split
        whole = f"{AROUND}{WHOLE}{self.token_text}{AROUND}"
        if not rows:
            return whole
        lines = (
            "".join(
                f"{AROUND}<row_{row}_col_{column}>{self.token_text}"
                for column in range(1, columns + 1)
            )
            for row in range(1, rows + 1)
        )
        return "".join(f"{line}\n" for line in lines) + "\n" + whole

    def _bounded(self, width: int, height: int) -> tuple[int, int]:
        """The longer side as long as it may be, the other one even."""
        aspect = width / height
        if width >= height:
            width = self._longest
            height = int(width / aspect)
            height += height % 2
        else:
            height = self._longest
            width = int(height * aspect)
            width += width % 2
        return max(width, 1), max(height, 1)

    def _multiples(self, width: int, height: int) -> tuple[int, int]:
        """Both sides as multiples of a tile's, not smaller."""
        side, aspect = self.side, width / height
        if width >= height:
            width = math.ceil(width / side) * side
            height = max(1, math.ceil(int(width / aspect) / side)) * side
        else:
            height = math.ceil(height / side) * side
            width = max(1, math.ceil(int(height * aspect) / side)) * side
        return width, height
