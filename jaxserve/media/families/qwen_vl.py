"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, M-RoPE.

Source: transformers' Qwen2VLImageProcessorPil and the models' get_rope_index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.media.decode import ImageError
from jaxserve.media.families.family import (
    CHANNELS,
    CLIP_MEAN,
    CLIP_STD,
    COMMON,
    Family,
    Prepared,
    array,
    pixels,
)
from jaxserve.media.picture import Shape

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_ASPECT = 200
"""A side over the other."""
LARGEST_AREA = 1 << 30
FEW = 256
"""Patches of a small picture: programs for fewer would save nothing."""


class QwenVL(Family):
    """A token is a square of merge x merge patches, which follow each other."""

    known = (*COMMON, "max_pixels", "min_pixels")
    marker_text = token_text = "<|image_pad|>"
    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(
        self, config: Mapping[str, Any], files: Mapping[str, Any] | None, given: Mapping[str, Any]
    ) -> None:
        super().__init__(config, files, given)
        self._merge = self.vision.integer("spatial_merge_size", default=2, high=64)
        self._frames = self.vision.integer("temporal_patch_size", default=2, high=16)
        for key, tower in (
            ("patch_size", self.patch_size),
            ("merge_size", self._merge),
            ("temporal_patch_size", self._frames),
        ):
            said = self.settings.integer(key, default=tower)
            if said != tower:
                raise ModelLoadError(
                    f"{self.settings.where}: {key} is {said}, and the tower's is {tower}"
                )
        self.width *= 1 + len(self.vision.integers("deepstack_visual_indexes"))
        size = self.settings.within("size")

        def area(key: str, edge: str, default: int) -> int:
            # A size that is asked for goes before what the file says under the other name.
            if self.settings.given(key) is not None and (key in given or "size" not in given):
                return self.settings.integer(key, high=LARGEST_AREA)
            return size.integer(edge, key, default=default, high=LARGEST_AREA)

        self._least = area("min_pixels", "shortest_edge", 56 * 56)
        self._most = area("max_pixels", "longest_edge", 28 * 28 * 1280)

    @property
    def patch_range(self) -> tuple[int, int]:
        area = self.patch_size**2
        unit = self._merge**2
        most = -(-self._most // (area * unit)) * unit
        return min(FEW // unit * unit or unit, most), most

    def prepare(self, image: Image) -> Prepared:
        height, width = self._resized(image.height, image.width)
        resized = image.resize((width, height), self._filter)
        patch, merge = self.patch_size, self._merge
        rows, columns = height // (patch * merge), width // (patch * merge)
        cut = pixels(resized).reshape(rows, merge, patch, columns, merge, patch, CHANNELS)
        patches = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, CHANNELS * patch * patch)
        return self._prepared(rows, columns, patches)

    def of_output(self, output: Mapping[str, Any]) -> list[Prepared]:
        values = array("pixel_values", output.get("pixel_values"), 2)
        area = self.patch_size**2
        if values.shape[1] != CHANNELS * self._frames * area:
            raise ImageError(
                f"pixel_values must have {CHANNELS * self._frames * area} columns, got shape "
                f"{values.shape}"
            )
        frames = values.reshape(len(values), CHANNELS, self._frames, area)
        if not (frames == frames[:, :, :1]).all():
            raise ImageError("pixel_values has different frames: it is no image's")
        patches = frames[:, :, 0].reshape(len(values), -1)
        grids = self._grids(output)
        merge = self._merge**2
        sizes = [rows * columns * merge for rows, columns in grids]
        if sum(sizes) != len(patches):
            raise ImageError(
                f"pixel_values has {len(patches)} patches, and image_grid_thw says {sum(sizes)}"
            )
        ends = np.cumsum(sizes)
        return [
            self._prepared(rows, columns, patches[end - size : end])
            for (rows, columns), size, end in zip(grids, sizes, ends, strict=True)
        ]

    def of_features(self, output: Mapping[str, Any], features: np.ndarray) -> list[Prepared]:
        grids = self._grids(output)
        sizes = [rows * columns for rows, columns in grids]
        if sum(sizes) != len(features):
            raise ImageError(
                f"feature has {len(features)} rows, and image_grid_thw says {sum(sizes)}"
            )
        return [
            Prepared(self.featured(features[end - size : end], grid), split=grid)
            for grid, size, end in zip(grids, sizes, np.cumsum(sizes), strict=True)
        ]

    def places(
        self, owners: np.ndarray, pictures: Sequence[Prepared]
    ) -> tuple[np.ndarray | None, int]:
        """Text counts on by one in all three; a picture's tokens have their row and column, and
        what follows it goes on after the longer of its sides."""
        size = len(owners)
        positions = np.empty((3, size), np.int32)
        done, place = 0, 0
        for number, prepared in enumerate(pictures):
            start = int(np.argmax(owners == number))
            positions[:, done:start] = np.arange(place, place + start - done)
            place += start - done
            rows, columns = prepared.split
            done = start + rows * columns
            positions[0, start:done] = place
            positions[1, start:done] = place + np.repeat(np.arange(rows), columns)
            positions[2, start:done] = place + np.tile(np.arange(columns), rows)
            place += max(rows, columns)
        positions[:, done:] = np.arange(place, place + size - done)
        return positions, place - done

    def _prepared(self, rows: int, columns: int, patches: np.ndarray) -> Prepared:
        """rows, columns: of tokens."""
        shape = Shape(1, rows * self._merge, columns * self._merge)
        return Prepared(self.picture(rows * columns, shape, patches), split=(rows, columns))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Multiples of a token's side, with an area in bounds, about as wide and high as before."""
        if max(height, width) / min(height, width) > MOST_ASPECT:
            raise ImageError(
                f"absolute aspect ratio must be smaller than {MOST_ASPECT}, got {width} x {height}"
            )
        side = self.patch_size * self._merge
        new = round(height / side) * side, round(width / side) * side
        if new[0] * new[1] > self._most:
            shrink = math.sqrt(height * width / self._most)
            new = (
                max(side, math.floor(height / shrink / side) * side),
                max(side, math.floor(width / shrink / side) * side),
            )
        elif new[0] * new[1] < self._least:
            grow = math.sqrt(self._least / (height * width))
            new = (
                math.ceil(height * grow / side) * side,
                math.ceil(width * grow / side) * side,
            )
        return new

    def _grids(self, output: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of each picture's tokens."""
        grids = array("image_grid_thw", output.get("image_grid_thw"), 2)
        merge = self._merge
        if grids.shape[1:] != (3,):
            raise ImageError(f"image_grid_thw must have 3 columns, got shape {grids.shape}")
        wrong = (grids < 1) | (grids > 1 << 20) | (grids % [1, merge, merge] != 0)
        if wrong.any() or (grids[:, 0] != 1).any():
            raise ImageError(
                f"image_grid_thw must be rows of 1 and two positive multiples of {merge}, got "
                f"{grids.tolist()[:4]}"
            )
        return [(int(rows) // merge, int(columns) // merge) for _, rows, columns in grids]
