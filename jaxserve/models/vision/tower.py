"""What every tower is: a module of its own, beside the decoder's.

Letters: P patches, C colour channels, p a patch's side in pixels, D the decoder's model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.media.picture import Shape
from jaxserve.models import values
from jaxserve.models.config import ModelConfig
from jaxserve.models.make import Make
from jaxserve.models.vision.attention import RangeAttention


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes that a step must know. A family adds its own in a subclass. Hashable."""

    architecture: str
    """Of the whole model: Hugging Face class name."""
    patch_size: int
    """p."""
    channels: int
    """C."""
    patches_per_token: int
    """Patches that become one row; divides every picture's."""
    rows: int
    """Matrices side by side in what a tower makes of a token: 1, and one for each further layer of
    the decoder that is given features (deepstack)."""
    hidden_size: int
    """D, of the decoder."""

    @property
    def patch_width(self) -> int:
        """C * p * p."""
        return self.channels * self.patch_size**2

    @property
    def width(self) -> int:
        """Of a token's row: rows * D."""
        return self.rows * self.hidden_size

    @property
    def unit(self) -> int:
        """Patches that a picture, and a run, has a multiple of."""
        return self.patches_per_token


class Tower(nnx.Module):
    """A family's. Pictures are packed side by side into P patches, the rest of which is padding;
    no picture sees another one. Its parameters are the paths of `registry.declare_tower`'s."""

    config_class: ClassVar[type[TowerConfig]] = TowerConfig
    """With the sizes that the family needs."""
    hf_defaults: ClassVar[Mapping[str, Any]] = {}
    """What transformers assumes for absent keys of `vision_config`."""
    text_defaults: ClassVar[Mapping[str, Any]] = {}
    """The same of `text_config`, where it differs from the decoder's own."""

    def __init__(self, config: TowerConfig, make: Make):
        raise NotImplementedError

    @classmethod
    def read_config(cls, hf: Mapping[str, Any], config: ModelConfig) -> TowerConfig:
        """A config.json -> `config_class`. config: the decoder's. Raises NotSupportedError and
        ModelLoadError, whose messages say that the key is one of `vision_config`."""
        vision = {**cls.hf_defaults, **values.table(hf, "vision_config")}
        try:
            fields = cls.config_fields(vision, hf, config)
        except (ModelLoadError, NotSupportedError) as error:
            raise type(error)(f"vision_config: {error}") from error
        size = config.hidden_size
        return cls.config_class(architecture=config.architecture, hidden_size=size, **fields)

    @staticmethod
    def config_fields(
        vision: Mapping[str, Any], hf: Mapping[str, Any], decoder: ModelConfig
    ) -> dict[str, Any]:
        """The fields of `config_class` but architecture and hidden_size.

        vision: `vision_config` with the family's defaults. hf: the whole config.json. decoder: the
        decoder's sizes.
        """
        raise NotImplementedError

    @staticmethod
    def facts(
        config: TowerConfig, shapes: Sequence[Shape], patches: int
    ) -> Mapping[str, np.ndarray]:
        """What a run of `patches` patches must know of the pictures in it, by name: int32 or
        float32 arrays whose shapes and dtypes follow from config and `patches` alone. patches: a
        multiple of `config.unit`. shapes: those that `config.check` lets through."""
        raise NotImplementedError

    def __call__(
        self, patches: jax.Array, facts: Mapping[str, jax.Array], attention: RangeAttention
    ) -> jax.Array:
        """Normalized patches [P, C * p * p] -> [P / patches_per_token, rows * D], in order."""
        raise NotImplementedError
