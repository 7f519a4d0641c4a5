"""A module without its arrays: what parameters it has, and how it gets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PathParts

from jaxserve.errors import ModelLoadError

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """Of a module: where each parameter is in it."""

    graphdef: nnx.GraphDef[Any]
    """The module without its parameters."""
    specs: Mapping[str, jax.ShapeDtypeStruct]
    """Shape and dtype of each parameter by dotted path, in the order in which programs take them as
    a flat tuple."""
    keys: tuple[PathParts, ...]
    """The nnx key of each path of `specs`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Declared(Generic[Config, Module]):
    """Config: of the module's sizes. Module: its class."""

    config: Config
    """Sizes."""
    dtype: jnp.dtype
    """Of every parameter, quantized kernels and their scales excepted."""
    structure: Structure
    """The parameters, and where they belong."""

    @property
    def specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each parameter by dotted path, in the order of the flat tuple."""
        return self.structure.specs

    def bind(self, params: Mapping[str, jax.Array]) -> Module:
        """The module with `params` (arrays or tracers) in place. Works inside jit.

        Raises ModelLoadError unless the paths are exactly those of `specs`.
        """
        if params.keys() != self.specs.keys():
            missing = sorted(self.specs.keys() - params.keys())
            extra = sorted(params.keys() - self.specs.keys())
            raise ModelLoadError(f"cannot bind parameters: missing {missing}, unexpected {extra}")
        pairs = zip(self.structure.keys, self.specs, strict=True)
        leaves = [(key, nnx.Param(params[path])) for key, path in pairs]
        return nnx.merge(self.structure.graphdef, nnx.from_flat_state(leaves))


def structure_of(construct: Callable[[], nnx.Module]) -> Structure:
    """Of what `construct` makes, which is traced: nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(construct))
    flat = nnx.to_flat_state(state)
    keys = tuple(key for key, _ in flat)
    specs = {
        ".".join(map(str, key)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in flat
    }
    return Structure(graphdef, specs, keys)
