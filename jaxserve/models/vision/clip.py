"""CLIP's tower, for LLaVA-1.5: features before the last layer, without the class token (Radford et
al. 2021; Liu et al. 2023; HF modeling_clip, modeling_llava).

Letters: B tiles of S patches, d the tower's model dim, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxserve.errors import NotSupportedError
from jaxserve.models import values
from jaxserve.models.config import ModelConfig
from jaxserve.models.make import Make
from jaxserve.models.vision.attention import RangeAttention
from jaxserve.models.vision.layers import MLP, LayerNorm
from jaxserve.models.vision.siglip import LLAMA, TilesConfig, TilesTower, tile_fields
from jaxserve.models.vision.tower import TowerConfig
from jaxserve.shown import quoted


@dataclasses.dataclass(frozen=True)
class LlavaConfig(TilesConfig):
    """And the projector's."""

    unused: tuple[int, ...]
    """Layers of the checkpoint behind those that are run."""
    projector_act: str
    """Between the projector's products."""
    projector_bias: bool
    """They have one."""


class LlavaTower(TilesTower):
    """A picture is one tile, and each patch a token."""

    config_class: ClassVar[type[TowerConfig]] = LlavaConfig
    patch_bias: ClassVar[bool] = False
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    text_defaults: ClassVar[Mapping[str, Any]] = LLAMA

    def __init__(self, config: LlavaConfig, make: Make):
        super().__init__(config, make)
        self.class_token = make.normal(config.dim)
        self.positions = make.normal(1 + config.unit, config.dim)
        self.first_norm = LayerNorm(config.dim, make, eps=config.eps)
        size, act, bias = config.hidden_size, config.projector_act, config.projector_bias
        self.projector = MLP(config.dim, size, size, make, act=act, bias=bias)

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        fields = tile_fields(vision, ("clip_vision_model",))
        strategy = values.text(hf, "vision_feature_select_strategy", "default")
        if strategy != "default":
            raise NotSupportedError(
                f"config.json: vision_feature_select_strategy={quoted(strategy)} is not "
                "supported, only 'default'"
            )
        layers, depth = hf.get("vision_feature_layer", -2), fields["depth"]
        if type(layers) is not int or not -depth - 1 <= layers <= depth:
            raise NotSupportedError(
                f"config.json: vision_feature_layer={quoted(layers)} is not supported, only one "
                f"of the {depth} layers"
            )
        run = layers if layers >= 0 else depth + 1 + layers
        return fields | {
            "patches_per_token": 1,
            "depth": run,
            "unused": tuple(range(run, depth)),
            "projector_act": values.text(hf, "projector_hidden_act", "gelu"),
            "projector_bias": values.flag(hf, "multimodal_projector_bias", True),
        }

    def __call__(
        self, patches: jax.Array, facts: Mapping[str, jax.Array], attention: RangeAttention
    ) -> jax.Array:
        del facts
        x = self.embed(patches)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, self.config.dim))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        x = self.run(self.first_norm(x), attention)[:, 1:]
        return self.projector(x.reshape(-1, self.config.dim))
