"""LLaVA-1.5: the centre of a picture, as one square.

Source: transformers' LlavaImageProcessorPil, CLIPImageProcessorPil and LlavaProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.errors import NotSupportedError
from jaxserve.media.decode import ImageError
from jaxserve.media.families.family import CLIP_MEAN, CLIP_STD, COMMON, Prepared
from jaxserve.media.families.squares import Squares

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_RESIZED = 1 << 26
"""Pixels of a picture whose shorter side has been resized, before it is cropped."""


class Llava(Squares):
    """The shorter side becomes the square's; a token is a patch."""

    known = (*COMMON, "crop_size", "do_center_crop", "do_pad")
    marker_text = token_text = "<image>"
    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(
        self, config: Mapping[str, Any], files: Mapping[str, Any] | None, given: Mapping[str, Any]
    ) -> None:
        super().__init__(config, files, given)
        strategy = self.config.given("vision_feature_select_strategy")
        if strategy not in (None, "default"):
            raise NotSupportedError(
                f"config.json: vision_feature_select_strategy {checks.quoted(strategy)} is not "
                "supported, only 'default' is"
            )
        if not self.settings.flag("do_center_crop", True):
            raise NotSupportedError(f"{self.settings.where}: do_center_crop=False is not supported")
        size, crop = self.settings.within("size"), self.settings.within("crop_size")
        self._shortest = size.integer("shortest_edge", "height", default=self.side, high=1 << 14)
        self._squared = size.given("shortest_edge") is None and size.given("height") is not None
        self._pad = self.settings.flag("do_pad", False)
        self.check_side(
            "crop_size",
            crop.integer("height", default=self.side),
            crop.integer("width", default=self.side),
        )

    @property
    def fixed_run(self) -> int:
        return self.patches_a_side**2

    def prepare(self, image: Image) -> Prepared:
        image = self._padded(image) if self._pad else image
        width, height = image.size
        if self._squared:
            new = (self._shortest, self._shortest)
        else:
            longest = int(self._shortest * max(width, height) / min(width, height))
            new = (self._shortest, longest) if width <= height else (longest, self._shortest)
        if new[0] * new[1] > MOST_RESIZED:
            raise ImageError(
                f"{width} x {height} pixels would be resized to {new[0]} x {new[1]}, before the "
                f"centre is cut out; at most {MOST_RESIZED} pixels are"
            )
        return Prepared(self.of_images([self._centre(image.resize(new, self._filter))]))

    def of_output(self, output: Mapping[str, Any]) -> list[Prepared]:
        squares = self.squares(output.get("pixel_values"))
        return [Prepared(self.of_values(square[None])) for square in squares]

    def _centre(self, image: Image) -> Image:
        """Of a smaller one all, within black."""
        left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))

    def _padded(self, image: Image) -> Image:
        """A square of the mean's colour, with the picture in its middle."""
        from PIL import Image as images

        side = max(image.size)
        if side * side > MOST_RESIZED:
            raise ImageError(
                f"{image.width} x {image.height} pixels would be padded to {side} x {side}; at "
                f"most {MOST_RESIZED} pixels are"
            )
        colour = tuple(int(mean * 255) for mean in self._means)
        square = images.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
