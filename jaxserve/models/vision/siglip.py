"""SigLIP's tower on square tiles, for Gemma 3 and for Idefics3 and SmolVLM (Zhai et al. 2023; HF
modeling_siglip, modeling_gemma3, modeling_idefics3).

Letters: B tiles of S patches, d the tower's model dim, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.media.picture import Shape
from jaxserve.models import values
from jaxserve.models.config import MOST_LAYERS, ModelConfig
from jaxserve.models.layers import RMSNorm
from jaxserve.models.make import Make
from jaxserve.models.vision.attention import Attend, RangeAttention
from jaxserve.models.vision.layers import MLP, Attention, Layer, LayerNorm, Linear, padded
from jaxserve.models.vision.tower import Tower, TowerConfig
from jaxserve.shown import quoted

LLAMA: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
)
"""Sizes that transformers assumes for a Llama behind a tower."""


@dataclasses.dataclass(frozen=True)
class TilesConfig(TowerConfig):
    """Sizes of a tower that takes tiles of one size."""

    depth: int
    """Layers that are run."""
    dim: int
    """d."""
    heads: int
    """Of attention."""
    mlp_dim: int
    """Of the layers' MLP, as the checkpoint has it."""
    act: str
    """Of the layers' MLP: a name that `layers.activation` knows."""
    eps: float
    """Of every LayerNorm."""
    side: int
    """Patches along a tile's side."""

    @property
    def unit(self) -> int:
        """S, of one tile."""
        return self.side**2

    @property
    def merge(self) -> int:
        """Patches along the side of the square that becomes one token."""
        return math.isqrt(self.patches_per_token)


class TilesTower(Tower):
    """Tiles of one size, each seeing itself only: a run needs no facts."""

    config_class: ClassVar[type[TowerConfig]] = TilesConfig
    patch_bias: ClassVar[bool] = True
    """The product of the patches has one."""

    def __init__(self, config: TilesConfig, make: Make):
        self.config = config
        self.patch_embed = Linear(config.patch_width, config.dim, make, bias=self.patch_bias)
        self.layers = nnx.List([self.layer(config, make) for _ in range(config.depth)])

    @staticmethod
    def layer(config: TilesConfig, make: Make) -> Layer:
        """One of the layers."""
        norms = tuple(LayerNorm(config.dim, make, eps=config.eps) for _ in range(2))
        mlp = MLP(config.dim, padded(config.mlp_dim), config.dim, make, act=config.act)
        return Layer((norms[0], norms[1]), Attention(config.dim, config.heads, make), mlp)

    @staticmethod
    def facts(
        config: TowerConfig, shapes: Sequence[Shape], patches: int
    ) -> Mapping[str, np.ndarray]:
        """None: all tiles are alike."""
        return {}

    def embed(self, patches: jax.Array) -> jax.Array:
        """[B * S, C * p * p] -> [B, S, d]."""
        x = self.patch_embed(patches.astype(self.patch_embed.kernel[...].dtype))
        return x.reshape(-1, self.config.unit, self.config.dim)

    def run(self, x: jax.Array, attend: Attend) -> jax.Array:
        """[B, S, d] -> the same behind the layers."""
        for layer in self.layers:
            x = layer(x, attend)
        return x


class SiglipTower(TilesTower):
    """Learned positions, and a norm behind the layers."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }

    def __init__(self, config: TilesConfig, make: Make):
        super().__init__(config, make)
        self.positions = make.normal(config.unit, config.dim)
        self.final_norm = LayerNorm(config.dim, make, eps=config.eps)

    def __call__(
        self, patches: jax.Array, facts: Mapping[str, jax.Array], attention: RangeAttention
    ) -> jax.Array:
        del facts
        x = self.run(self.embed(patches) + self.positions[...], attention)
        x = self.final_norm(x)
        side, merge, dim = self.config.side, self.config.merge, self.config.dim
        squares = x.reshape(-1, side // merge, merge, side // merge, merge, dim)
        return self.project(squares.swapaxes(2, 3).reshape(-1, merge**2, dim))

    def project(self, squares: jax.Array) -> jax.Array:
        """The patches of each token, [T, merge * merge, d] -> [T, D]."""
        raise NotImplementedError


class OnePlusNorm(RMSNorm):
    """The parameter is what the weights differ from 1 by: in float32, bfloat16 would lose bits."""

    def weights(self) -> jax.Array:
        return 1 + self.scale[...].astype(jnp.float32)


class Gemma3Tower(SiglipTower):
    """The mean of a token's patches, a norm and a product."""

    text_defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    }

    def __init__(self, config: TilesConfig, make: Make):
        super().__init__(config, make)
        self.norm = OnePlusNorm(config.dim, make, eps=config.eps)
        self.projection = Linear(config.dim, config.hidden_size, make, bias=False)

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        fields = tile_fields(vision, ("siglip_vision_model",))
        tokens = values.size(hf, "mm_tokens_per_image", 256)
        across = math.isqrt(tokens)
        if across**2 != tokens or fields["side"] % across:
            raise ModelLoadError(
                f"config.json: mm_tokens_per_image={tokens} is no square of equal squares of "
                f"{fields['side']} x {fields['side']} patches"
            )
        return fields | {"patches_per_token": (fields["side"] // across) ** 2}

    def project(self, squares: jax.Array) -> jax.Array:
        mean = squares.astype(jnp.float32).mean(axis=1).astype(squares.dtype)
        return self.projection(self.norm(mean))


class Idefics3Tower(SiglipTower):
    """A token's patches side by side, and a product; SmolVLM's, too."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        **SiglipTower.hf_defaults,
        "hidden_size": 1152,
        "num_attention_heads": 16,
        "patch_size": 32,
    }
    text_defaults: ClassVar[Mapping[str, Any]] = {**LLAMA, "rms_norm_eps": 1e-5}

    def __init__(self, config: TilesConfig, make: Make):
        super().__init__(config, make)
        wide = config.dim * config.patches_per_token
        self.projection = Linear(wide, config.hidden_size, make, bias=False)

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        types = ("idefics3", "idefics3_vision", "smolvlm_vision", "siglip_vision_model")
        fields = tile_fields(vision, types)
        scale = values.size(hf, "scale_factor", 2)
        if fields["side"] % scale:
            raise ModelLoadError(
                f"config.json: scale_factor={scale} does not divide the {fields['side']} patches "
                "of a tile's side"
            )
        return fields | {"patches_per_token": scale**2}

    def project(self, squares: jax.Array) -> jax.Array:
        return self.projection(squares.reshape(len(squares), -1))


def tile_fields(vision: Mapping[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """What towers of tiles read from vision_config in the same way, which must be of one of
    `types`."""
    kind = vision.get("model_type", types[0])
    if kind not in types:
        raise NotSupportedError(
            f"config.json: model_type={quoted(kind)} is not supported; supported: "
            f"{', '.join(types)}"
        )
    size, patch = values.size(vision, "image_size"), values.size(vision, "patch_size")
    dim, heads = values.size(vision, "hidden_size"), values.size(vision, "num_attention_heads")
    if size % patch or dim % heads:
        raise ModelLoadError(
            f"config.json: patch_size={patch} must divide image_size={size}, and "
            f"num_attention_heads={heads} hidden_size={dim}"
        )
    return {
        "patch_size": patch,
        "channels": values.size(vision, "num_channels"),
        "rows": 1,
        "depth": values.size(vision, "num_hidden_layers", most=MOST_LAYERS),
        "dim": dim,
        "heads": heads,
        "mlp_dim": values.size(vision, "intermediate_size"),
        "act": values.text(vision, "hidden_act", ""),
        "eps": values.number(vision, "layer_norm_eps", least=0),
        "side": size // patch,
    }
