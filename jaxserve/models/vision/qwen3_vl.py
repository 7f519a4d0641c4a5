"""Qwen3-VL's tower: learned positions besides the rotation, and features of some of its layers for
the decoder's first ones (Qwen team 2025; HF modeling_qwen3_vl; deepstack: Meng et al. 2024).

Letters: P patches, d the tower's model dim, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.errors import ModelLoadError
from jaxserve.media.picture import Shape
from jaxserve.models import values
from jaxserve.models.config import ModelConfig
from jaxserve.models.make import Make
from jaxserve.models.vision.attention import RangeAttention, within
from jaxserve.models.vision.layers import LayerNorm
from jaxserve.models.vision.qwen2_vl import (
    EPS,
    Merger,
    Qwen2VLConfig,
    Qwen2VLTower,
    common_fields,
    layer_numbers,
)
from jaxserve.models.vision.tower import TowerConfig


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(Qwen2VLConfig):
    """And what is added to it."""

    side: int
    """Of the square of learned positions."""
    deep_layers: tuple[int, ...]
    """Layers behind which features are taken for the decoder's layers 0, 1, ..."""


class Qwen3VLTower(Qwen2VLTower):
    """See the module. A token's row has what stands in its place, then what is added behind the
    decoder's first layers."""

    config_class: ClassVar[type[TowerConfig]] = Qwen3VLConfig
    patch_bias: ClassVar[bool] = True
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 27,
        "hidden_size": 1152,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    text_defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 128000,
        "rope_theta": 500000.0,
    }

    def __init__(self, config: Qwen3VLConfig, make: Make):
        super().__init__(config, make)
        self.positions = make.normal(config.side**2, config.dim)
        wide = config.dim * config.patches_per_token
        self.mergers = nnx.List(
            [
                Merger(config, make, LayerNorm(wide, make, eps=EPS), late=True)
                for _ in config.deep_layers
            ]
        )

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        dim = values.size(vision, "hidden_size")
        fields = common_fields(vision, dim, "out_hidden_size", decoder)
        positions = values.size(vision, "num_position_embeddings")
        side = math.isqrt(positions)
        if side**2 != positions:
            raise ModelLoadError(
                f"config.json: num_position_embeddings={positions} is not a square"
            )
        layers = layer_numbers(vision, "deepstack_visual_indexes", fields["depth"])
        if len(layers) > decoder.num_layers:
            raise ModelLoadError(
                f"config.json: deepstack_visual_indexes={list(layers)} are more than the "
                f"decoder's num_hidden_layers={decoder.num_layers}"
            )
        return fields | {
            "mlp_dim": values.size(vision, "intermediate_size"),
            "side": side,
            "deep_layers": layers,
            "rows": 1 + len(layers),
        }

    @staticmethod
    def facts(
        config: TowerConfig, shapes: Sequence[Shape], patches: int
    ) -> Mapping[str, np.ndarray]:
        """Besides Qwen2-VL's: near [4, P] int32, which four learned positions a patch lies between,
        and weights [4, P] float32, how much it has of each."""
        assert isinstance(config, Qwen3VLConfig)
        found = dict(Qwen2VLTower.facts(config, shapes, patches))
        heights, widths = np.ones((2, patches), np.int32)
        start = 0
        for shape in shapes:
            end = start + shape.patches
            heights[start:end], widths[start:end] = shape.height, shape.width
            start = end
        rows = _between(found["rows"], heights, config.side)
        columns = _between(found["columns"], widths, config.side)
        pairs = [(row, column) for row in rows for column in columns]
        found["near"] = np.stack([r * config.side + c for (r, _), (c, _) in pairs])
        found["weights"] = np.stack([a * b for (_, a), (_, b) in pairs])
        return found

    def __call__(
        self, patches: jax.Array, facts: Mapping[str, jax.Array], attention: RangeAttention
    ) -> jax.Array:
        config = self.config
        assert isinstance(config, Qwen3VLConfig)
        x = self.embed(patches)
        near = jnp.take(self.positions[...], facts["near"], axis=0, mode="clip")
        between = jnp.einsum("npd,np->pd", near.astype(jnp.float32), facts["weights"])
        x = x + between.astype(x.dtype)
        turn = self.turn(facts["rows"], facts["columns"])
        attend = within(attention, facts["starts"], facts["ends"])
        deep = []
        for index, layer in enumerate(self.layers):
            x = layer(x, attend, turn)
            if index in config.deep_layers:
                deep.append(self.mergers[config.deep_layers.index(index)](x))
        return jnp.concatenate([self.merger(x), *deep], axis=-1)


def _between(
    places: np.ndarray, sizes: np.ndarray, side: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The two of `side` learned places that lie around each of places [P], of `sizes` along the
    picture, and how much it has of either. The first and the last of both coincide."""
    at = (
        places.astype(np.float32)
        * np.float32(side - 1)
        / np.maximum(sizes - 1, 1, dtype=np.float32)
    )
    low = np.minimum(at.astype(np.int32), side - 1)
    share = at - low.astype(np.float32)
    return (low, 1 - share), (np.minimum(low + 1, side - 1), share)
