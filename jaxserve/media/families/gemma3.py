"""Gemma 3: squares of 256 tokens that see each other; a long picture may be cut ("pan and scan").

Source: transformers' Gemma3ImageProcessorPil and Gemma3Processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.media.decode import ImageError
from jaxserve.media.families.family import COMMON, Prepared, array
from jaxserve.media.families.squares import Squares
from jaxserve.media.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN, END = "<start_of_image>", "<end_of_image>"
MOST_CROPS = 64


class Gemma3(Squares):
    """Each square is resized to, whatever its sides were."""

    known = (
        *COMMON,
        "do_pan_and_scan",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_min_ratio_to_activate",
    )
    marker_text = BEGIN
    token_text = "<image_soft_token>"
    resample = 2

    def __init__(
        self, config: Mapping[str, Any], files: Mapping[str, Any] | None, given: Mapping[str, Any]
    ) -> None:
        super().__init__(config, files, given)
        self.marker = self._id("boi_token_index", "boi_token_id")
        self._run = self.config.integer("mm_tokens_per_image", default=256)
        size = self.settings.within("size")
        self.check_side(
            "size",
            size.integer("height", default=self.side),
            size.integer("width", default=self.side),
        )
        # Of pan and scan the files say nothing that counts: Gemma3Processor has these defaults.
        asked = Settings("mm_process_config['image']", given)
        self._cut = asked.flag("do_pan_and_scan", False)
        self._least = asked.integer("pan_and_scan_min_crop_size", default=256)
        self._most = asked.integer("pan_and_scan_max_num_crops", default=4, high=MOST_CROPS)
        self._ratio = asked.number("pan_and_scan_min_ratio_to_activate", 1.2, above=0.0)

    @property
    def fixed_run(self) -> int:
        return self._run

    @property
    def most_squares(self) -> int:
        return 1 + self._most if self._cut else 1

    @property
    def block(self) -> int:
        return self._run

    def prepare(self, image: Image) -> Prepared:
        whole = [image, *self._crops(image)] if self._cut else [image]
        size = (self.side, self.side)
        squares = [part.resize(size, self._filter) for part in whole]
        return Prepared(self.of_images(squares), runs=len(squares))

    def of_output(self, output: Mapping[str, Any]) -> list[Prepared]:
        squares = self.squares(output.get("pixel_values"))
        crops = output.get("num_crops")
        counts = [1] * len(squares)
        if crops is not None:
            counts = [1 + int(count) for count in array("num_crops", crops).reshape(-1)]
        if min(counts, default=1) < 1 or sum(counts) != len(squares):
            raise ImageError(
                f"pixel_values has {len(squares)} squares, and num_crops says {sum(counts)}"
            )
        parts = np.split(squares, np.cumsum(counts)[:-1])
        return [Prepared(self.of_values(part), runs=len(part)) for part in parts]

    def frame(self, prepared: Prepared) -> str:
        block = f"\n\n{BEGIN}{self.token_text}{END}\n\n"
        if prepared.runs == 1:
            return block
        crops = " ".join([block] * (prepared.runs - 1))
        return (
            f"Here is the original image {block} and here are some crops to help you see better "
            + crops
        )

    def reach(self, owners: np.ndarray) -> np.ndarray:
        """A block is a run of adjacent tokens of pictures, and each of it sees all of it."""
        size = len(owners)
        reach = np.arange(size, dtype=np.int32)
        inside = np.concatenate(([False], owners >= 0, [False]))
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        for start, end in edges.reshape(-1, 2):
            reach[start:end] = end - 1
        return reach

    def _crops(self, image: Image) -> list[Image]:
        """The longer side in equal parts, where it is long enough for that; none elsewhere."""
        wide = image.width >= image.height
        longer, shorter = (image.width, image.height) if wide else (image.height, image.width)
        if longer / shorter < self._ratio:
            return []
        count = min(longer // self._least, math.floor(longer / shorter + 0.5))
        count = min(self._most, max(2, count))
        part = math.ceil(longer / count)
        if min(part, shorter) < self._least:
            return []
        spans = [(start, min(start + part, longer)) for start in range(0, part * count, part)]
        if wide:
            return [image.crop((start, 0, end, shorter)) for start, end in spans]
        return [image.crop((0, start, shorter, end)) for start, end in spans]
