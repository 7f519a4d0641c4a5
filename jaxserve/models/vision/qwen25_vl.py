"""Qwen2.5-VL's tower: windows in most layers, RMSNorm and a gated MLP (Bai et al. 2025; HF
modeling_qwen2_5_vl).

Patches are brought into the order of their windows once, a token's together, and their rows back at
the end: a window is then some neighbouring patches, as a picture is in either order.

Letters: P patches, d the tower's model dim, N heads, H head dim, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxserve.errors import ModelLoadError
from jaxserve.media.picture import Shape
from jaxserve.models import values
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import RMSNorm
from jaxserve.models.make import Make
from jaxserve.models.vision import grid
from jaxserve.models.vision.attention import RangeAttention, within
from jaxserve.models.vision.layers import GatedMLP, padded
from jaxserve.models.vision.qwen2_vl import (
    EPS,
    Qwen2VLConfig,
    Qwen2VLTower,
    common_fields,
    layer_numbers,
)
from jaxserve.models.vision.tower import TowerConfig


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(Qwen2VLConfig):
    """And windows."""

    window: int
    """Tokens of a window's side."""
    whole_layers: tuple[int, ...]
    """Layers whose patches see all of their picture."""

    @property
    def window_patches(self) -> int:
        """Of a window that a picture fills."""
        return self.patches_per_token * self.window**2


class Qwen25VLTower(Qwen2VLTower):
    """See the module."""

    config_class: ClassVar[type[TowerConfig]] = Qwen25VLConfig
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }

    @staticmethod
    def norm(dim: int, make: Make) -> RMSNorm:
        return RMSNorm(dim, make, eps=EPS)

    @staticmethod
    def feed_forward(config: Qwen2VLConfig, make: Make) -> GatedMLP:
        return GatedMLP(config.dim, padded(config.mlp_dim), make, act=config.act)

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        dim = values.size(vision, "hidden_size")
        fields = common_fields(vision, dim, "out_hidden_size", decoder)
        size = values.size(vision, "window_size")
        window = size // fields["merge"] // fields["patch_size"]
        if not window:
            raise ModelLoadError(f"config.json: window_size={size} is less than a token")
        return fields | {
            "mlp_dim": values.size(vision, "intermediate_size"),
            "window": window,
            "whole_layers": layer_numbers(vision, "fullatt_block_indexes", fields["depth"]),
        }

    @staticmethod
    def facts(
        config: TowerConfig, shapes: Sequence[Shape], patches: int
    ) -> Mapping[str, np.ndarray]:
        """rows, columns, starts, ends, window_starts, window_ends: [P] int32 in the order of
        windows. order [P / patches_per_token]: which token comes where in it, back: the inverse."""
        assert isinstance(config, Qwen25VLConfig)
        each = config.patches_per_token
        order, lengths = _windows(config, shapes)
        order = np.concatenate([order, np.arange(len(order), patches // each)]).astype(np.int32)
        found = grid.places(shapes, config.merge, patches)
        rows, columns = (x.reshape(-1, each)[order].reshape(-1) for x in found)
        starts, ends = grid.tile_ranges(shapes, patches)
        window_starts, window_ends = grid.ranges((each * lengths).tolist(), patches)
        return {
            "rows": rows,
            "columns": columns,
            "starts": starts,
            "ends": ends,
            "window_starts": window_starts,
            "window_ends": window_ends,
            "order": order,
            "back": np.argsort(order).astype(np.int32),
        }

    def __call__(
        self, patches: jax.Array, facts: Mapping[str, jax.Array], attention: RangeAttention
    ) -> jax.Array:
        config = self.config
        assert isinstance(config, Qwen25VLConfig)
        each = config.patches_per_token
        by_token = patches.reshape(-1, each, patches.shape[-1])
        x = self.embed(by_token[facts["order"]].reshape(patches.shape))
        turn = self.turn(facts["rows"], facts["columns"])
        whole = within(attention, facts["starts"], facts["ends"])
        window = within(
            attention, facts["window_starts"], facts["window_ends"], config.window_patches
        )
        for index, layer in enumerate(self.layers):
            x = layer(x, whole if index in config.whole_layers else window, turn)
        return self.merger(x)[facts["back"]]


def _windows(config: Qwen25VLConfig, shapes: Sequence[Shape]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all pictures in the order of their windows, and each window's number of them.
    Within a window they keep their order."""
    orders, lengths, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for shape in shapes:
        height, width = shape.height // config.merge, shape.width // config.merge
        across = -(-width // config.window)
        down = -(-height // config.window)
        tile, row, column = np.indices((shape.tiles, height, width)).reshape(3, -1)
        number = (tile * down + row // config.window) * across + column // config.window
        orders.append(first + np.argsort(number, kind="stable"))
        lengths.append(np.bincount(number))
        first += len(number)
    return np.concatenate(orders), np.concatenate(lengths)
