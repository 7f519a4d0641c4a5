"""Which class implements a Hugging Face architecture, and what parameters it declares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PathParts

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import values
from jaxserve.models.config import ModelConfig, common_fields
from jaxserve.models.decoder import Decoder
from jaxserve.models.llama import Llama
from jaxserve.models.make import Make
from jaxserve.models.mistral import Mistral
from jaxserve.models.qwen2 import Qwen2
from jaxserve.models.qwen3 import Qwen3
from jaxserve.shown import quoted

_FAMILIES: tuple[tuple[str, str, type[Decoder]], ...] = (
    # architecture in config.json, its model_type, class
    ("LlamaForCausalLM", "llama", Llama),
    ("MistralForCausalLM", "mistral", Mistral),
    ("Qwen2ForCausalLM", "qwen2", Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Qwen3),
)


def supported_architectures() -> list[str]:
    """Values of config.json's `architectures` that can be loaded."""
    return [architecture for architecture, _, _ in _FAMILIES]


def architecture_of(hf: Mapping[str, Any]) -> str:
    """The architecture that a config.json names: the first supported one of `architectures`, or
    what `model_type` implies where that list is absent. Raises NotSupportedError, ModelLoadError
    for what is no list of strings."""
    given = values.strings(hf, "architectures")
    for architecture, model_type, _ in _FAMILIES:
        if architecture in given or (not given and hf.get("model_type") == model_type):
            return architecture
    key, found = ("architectures", given) if given else ("model_type", hf.get("model_type"))
    raise NotSupportedError(
        f"config.json: {key}={quoted(found)} is not supported; supported architectures: "
        f"{', '.join(supported_architectures())}"
    )


def family(architecture: str) -> type[Decoder]:
    """The nnx class of an architecture. Raises NotSupportedError, listing the supported ones."""
    for name, _, cls in _FAMILIES:
        if name == architecture:
            return cls
    raise NotSupportedError(
        f"architecture {architecture!r} is not supported; supported architectures: "
        f"{', '.join(supported_architectures())}"
    )


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the dict of a config.json (transformers 4 or 5 spelling).

    Raises NotSupportedError for an architecture or feature that we do not have (the message lists
    the supported architectures), ModelLoadError for a missing or impossible value.
    """
    architecture = architecture_of(hf)
    cls = family(architecture)
    hf = {**cls.hf_defaults, **hf}
    return cls.config_class(**(common_fields(hf, architecture) | cls.config_fields(hf)))


@dataclasses.dataclass(frozen=True, eq=False)
class Declaration:
    """A model without its arrays."""

    config: ModelConfig
    """Sizes, of the family's own `config_class`."""
    dtype: jnp.dtype
    """Of every parameter, the quantized kernels and their scales excepted."""
    quantization: str | None
    """A scheme of models.quantization."""
    parts: int
    """Devices that the model is cut over; the parameters are those of one of them."""
    axis: str | None
    """Their mesh axis."""
    graphdef: nnx.GraphDef[Decoder]
    """The module's structure."""
    specs: Mapping[str, jax.ShapeDtypeStruct]
    """Shape and dtype of each parameter by dotted path, in the order in which the engine passes
    them as a flat tuple."""
    keys: tuple[PathParts, ...]
    """The nnx key of each path of `specs`."""

    @functools.cached_property
    def scales(self) -> Mapping[str, str]:
        """Path of each quantized kernel -> path of its scale."""
        return {path: f"{path}_scale" for path in self.specs if f"{path}_scale" in self.specs}

    def bind(self, params: Mapping[str, jax.Array]) -> Decoder:
        """The module with `params` (arrays or tracers) in place. Works inside jit.

        Raises ModelLoadError unless the paths are exactly those of `specs`.
        """
        if params.keys() != self.specs.keys():
            missing = sorted(self.specs.keys() - params.keys())
            extra = sorted(params.keys() - self.specs.keys())
            raise ModelLoadError(f"cannot bind parameters: missing {missing}, unexpected {extra}")
        leaves = [
            (key, nnx.Param(params[path])) for key, path in zip(self.keys, self.specs, strict=True)
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(leaves))


def declare(
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    quantization: str | None = None,
    *,
    parts: int = 1,
    axis: str | None = None,
) -> Declaration:
    """The parameters of a model and how to bind them; allocates nothing.

    parts, axis: the model as one of so many devices along a mesh axis has it, see `Make`.
    dtype: of every parameter. quantization: a scheme of models.quantization; kernels of the layers'
    linear parts are then int8 or float8_e4m3fn, with a parameter `kernel_scale` beside each.
    Raises NotSupportedError for an unknown architecture or scheme.
    """
    cls = family(config.architecture)
    dtype = jnp.dtype(dtype)
    make = Make(dtype, None, quantization, parts, axis)
    shapes = nnx.eval_shape(lambda: cls(config, make))
    graphdef, state = nnx.split(shapes)
    flat = nnx.to_flat_state(state)
    keys = tuple(key for key, _ in flat)
    specs = {
        ".".join(map(str, key)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in flat
    }
    return Declaration(config, dtype, quantization, parts, axis, graphdef, specs, keys)
