"""What the families have in common whose towers take squares of one size."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.media.decode import ImageError
from jaxserve.media.families.family import CHANNELS, Family, Prepared, array, pixels, raster
from jaxserve.media.picture import Picture, Shape

if TYPE_CHECKING:
    from PIL.Image import Image


class Squares(Family):
    """Pictures are one or more squares of the tower's size; each becomes `fixed_run` tokens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        side = self.vision.integer("image_size", high=1 << 14)
        if side % self.patch_size:
            raise ModelLoadError(
                f"config.json: vision_config: image_size {side} is no multiple of patch_size "
                f"{self.patch_size}"
            )
        self.side = side
        """Of a square, in pixels."""
        self.patches_a_side = side // self.patch_size
        """Of a square."""

    @property
    @abc.abstractmethod
    def fixed_run(self) -> int:
        """Tokens of a square."""

    @property
    def most_squares(self) -> int:
        """Of a picture."""
        return 1

    @property
    def patch_range(self) -> tuple[int, int]:
        square = self.patches_a_side**2
        return square, square * self.most_squares

    def of_features(self, output: Mapping[str, Any], features: np.ndarray) -> list[Prepared]:
        """Each square is a picture of its own: which ones are one image's is not said."""
        run = self.fixed_run
        if len(features) % run:
            raise ImageError(f"feature has {len(features)} rows, which is no multiple of {run}")
        pieces = np.split(features, len(features) // run) if len(features) else []
        return [Prepared(self.featured(piece)) for piece in pieces]

    def check_side(self, key: str, *sides: int) -> None:
        """Raises ModelLoadError unless the processor makes squares of the tower's size."""
        if set(sides) != {self.side}:
            raise ModelLoadError(
                f"{self.settings.where}: {key} is {' x '.join(map(str, sides))}, and the tower's "
                f"image_size is {self.side}"
            )

    def of_images(self, squares: Sequence[Image]) -> Picture:
        """One picture of squares that have the tower's size."""
        parts = [raster(pixels(square), self.patch_size) for square in squares]
        return self._of(len(squares), parts[0] if len(parts) == 1 else np.concatenate(parts))

    def of_values(self, squares: np.ndarray) -> Picture:
        """One picture of normalized squares [squares, C, side, side]."""
        parts = [raster(square.transpose(1, 2, 0), self.patch_size) for square in squares]
        return self._of(len(squares), np.concatenate(parts))

    def squares(self, value: Any) -> np.ndarray:
        """`pixel_values` of a processor, of one prompt, as [squares, C, side, side]."""
        values = array("pixel_values", value)
        if values.ndim == 5 and len(values) == 1:
            values = values[0]
        if values.ndim != 4 or values.shape[1:] != (CHANNELS, self.side, self.side):
            raise ImageError(
                f"pixel_values must be images of {CHANNELS} x {self.side} x {self.side}, got shape "
                f"{values.shape}"
            )
        return values

    def _of(self, squares: int, patches: np.ndarray) -> Picture:
        shape = Shape(squares, self.patches_a_side, self.patches_a_side)
        return self.picture(squares * self.fixed_run, shape, patches)
