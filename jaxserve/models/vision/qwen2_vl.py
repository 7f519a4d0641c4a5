"""Qwen2-VL's tower, and what those after it share: pictures of any size, patches rotated by row and
column, 2 x 2 of them one token (Wang et al. 2024; HF modeling_qwen2_vl).

Letters: P patches, C colour channels, p a patch's side, d the tower's model dim, N heads, H head
dim, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.errors import ModelLoadError
from jaxserve.media.picture import Shape
from jaxserve.models import rope, values
from jaxserve.models.config import MOST_LAYERS, ModelConfig
from jaxserve.models.layers import RMSNorm
from jaxserve.models.make import Make
from jaxserve.models.rope_config import RopeConfig
from jaxserve.models.vision import grid
from jaxserve.models.vision.attention import RangeAttention, within
from jaxserve.models.vision.layers import (
    MLP,
    Attention,
    GatedMLP,
    Layer,
    LayerNorm,
    Linear,
    padded,
)
from jaxserve.models.vision.tower import Tower, TowerConfig

EPS = 1e-6
"""Of every norm of these towers; no config.json states it."""


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig(TowerConfig):
    """Sizes of Qwen's towers."""

    depth: int
    """Layers."""
    dim: int
    """d."""
    heads: int
    """N."""
    mlp_dim: int
    """Of the layers' MLP, as the checkpoint has it."""
    act: str
    """Of the layers' MLP: a name that `layers.activation` knows."""
    merge: int
    """Rows, and columns, of patches that become one token."""
    frames: int
    """Of a video in one patch; a picture is repeated so often."""
    theta: float
    """Base of the frequencies."""


class Merger(nnx.Module):
    """merge * merge patches side by side -> one row: a norm, then two products."""

    def __init__(
        self, config: Qwen2VLConfig, make: Make, norm: LayerNorm | RMSNorm, *, late: bool = False
    ):
        """late: the norm is over all that stands side by side, else over each patch."""
        self.size = config.dim * config.patches_per_token
        self.norm, self.late = norm, late
        self.mlp = MLP(self.size, self.size, config.hidden_size, make, act="gelu")

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [P, d] -> [P / (merge * merge), D]."""
        if self.late:
            return self.mlp(self.norm(x.reshape(-1, self.size)))
        return self.mlp(self.norm(x).reshape(-1, self.size))


class Qwen2VLTower(Tower):
    """Layers with LayerNorm and an MLP of two products; every patch sees its picture."""

    config_class: ClassVar[type[TowerConfig]] = Qwen2VLConfig
    patch_bias: ClassVar[bool] = False
    """The product of the patches has one."""
    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text_defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_window_layers": 80,
        "rope_theta": 1e6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }

    def __init__(self, config: Qwen2VLConfig, make: Make):
        self.config = config
        width = config.patch_width * config.frames
        self.patch_embed = Linear(width, config.dim, make, bias=self.patch_bias)
        self.layers = nnx.List([self.layer(config, make) for _ in range(config.depth)])
        self.merger = Merger(config, make, self.norm(config.dim, make))

    @classmethod
    def read_config(cls, hf: Mapping[str, Any], config: ModelConfig) -> TowerConfig:
        if not config.rope.sections:
            raise ModelLoadError("config.json: the decoder's RoPE parameters lack mrope_section")
        return super().read_config(hf, config)

    @staticmethod
    def norm(dim: int, make: Make) -> LayerNorm | RMSNorm:
        """The norm of the layers, and of the merger."""
        return LayerNorm(dim, make, eps=EPS)

    @classmethod
    def layer(cls, config: Qwen2VLConfig, make: Make) -> Layer:
        """One of the layers."""
        norms = cls.norm(config.dim, make), cls.norm(config.dim, make)
        attend = Attention(config.dim, config.heads, make)
        return Layer(norms, attend, cls.feed_forward(config, make))

    @staticmethod
    def feed_forward(config: Qwen2VLConfig, make: Make) -> MLP | GatedMLP:
        """What a layer has behind attention."""
        return MLP(config.dim, padded(config.mlp_dim), config.dim, make, act=config.act)

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        dim = values.size(vision, "embed_dim")
        fields = common_fields(vision, dim, "hidden_size", decoder)
        return fields | {"mlp_dim": dim * values.size(vision, "mlp_ratio")}

    @staticmethod
    def facts(
        config: TowerConfig, shapes: Sequence[Shape], patches: int
    ) -> Mapping[str, np.ndarray]:
        """rows, columns, starts, ends: [P] int32."""
        assert isinstance(config, Qwen2VLConfig)
        starts, ends = grid.tile_ranges(shapes, patches)
        found = grid.places(shapes, config.merge, patches)
        return {"rows": found.rows, "columns": found.columns, "starts": starts, "ends": ends}

    def __call__(
        self, patches: jax.Array, facts: Mapping[str, jax.Array], attention: RangeAttention
    ) -> jax.Array:
        x, turn = self.embed(patches), self.turn(facts["rows"], facts["columns"])
        attend = within(attention, facts["starts"], facts["ends"])
        for layer in self.layers:
            x = layer(x, attend, turn)
        return self.merger(x)

    def embed(self, patches: jax.Array) -> jax.Array:
        """[P, C * p * p] -> [P, d]."""
        config = self.config
        frame = patches.astype(self.patch_embed.kernel[...].dtype)
        frame = frame.reshape(len(patches), config.channels, 1, -1)
        frames = jnp.repeat(frame, config.frames, axis=2)
        return self.patch_embed(frames.reshape(len(patches), -1))

    def turn(self, rows: jax.Array, columns: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """rows, columns [P] int32 -> what rotates x [P, N, H]: the first half of the pairs by the
        row, the other by the column, both with the same frequencies."""
        config = self.config
        each = RopeConfig(theta=config.theta), config.dim // config.heads // 2
        by_row, by_column = (rope.cos_sin(*each, places) for places in (rows, columns))
        cos, sin = (jnp.concatenate(pair, axis=-1) for pair in zip(by_row, by_column, strict=True))
        return lambda x: rope.rotate(x, cos, sin)


def common_fields(
    vision: Mapping[str, Any], dim: int, out: str, decoder: ModelConfig
) -> dict[str, Any]:
    """What all of Qwen's towers read from vision_config in the same way.

    dim: d. out: the key that states D. Raises ModelLoadError where that is not the decoder's.
    """
    heads, merge = values.size(vision, "num_heads"), values.size(vision, "spatial_merge_size")
    if dim % (4 * heads):
        raise ModelLoadError(
            f"config.json: a tower of width {dim} and num_heads={heads} has no heads of a multiple "
            "of 4, which are rotated by row and by column"
        )
    if values.size(vision, out) != decoder.hidden_size:
        raise ModelLoadError(
            f"config.json: {out}={vision[out]} must be the decoder's "
            f"hidden_size={decoder.hidden_size}"
        )
    rotation = values.table(vision, "rope_parameters")
    return {
        "patch_size": values.size(vision, "patch_size"),
        "channels": values.size(vision, "in_channels"),
        "patches_per_token": merge**2,
        "rows": 1,
        "depth": values.size(vision, "depth", most=MOST_LAYERS),
        "dim": dim,
        "heads": heads,
        "act": values.text(vision, "hidden_act", ""),
        "merge": merge,
        "frames": values.size(vision, "temporal_patch_size"),
        "theta": values.number(rotation, "rope_theta", 1e4, least=1),
    }


def layer_numbers(vision: Mapping[str, Any], key: str, depth: int) -> tuple[int, ...]:
    """A list of different ones of `depth` layers. Raises ModelLoadError."""
    found, known = vision[key], range(depth)
    listed = isinstance(found, (list, tuple)) and all(type(x) is int and x in known for x in found)
    if not listed or len(set(found)) < len(found):
        raise values.bad(key, f"a list of different layers below {depth}", found)
    return tuple(found)
