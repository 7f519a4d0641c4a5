"""Which class implements a Hugging Face architecture, and what parameters it declares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.errors import NotSupportedError
from jaxserve.models import values
from jaxserve.models.cohere2 import Cohere2
from jaxserve.models.config import ModelConfig, common_fields, layer_ropes
from jaxserve.models.declared import Declared, structure_of
from jaxserve.models.decoder import Decoder
from jaxserve.models.gemma2 import Gemma2
from jaxserve.models.gemma3 import Gemma3
from jaxserve.models.glm import Glm, Glm4
from jaxserve.models.granite import Granite
from jaxserve.models.llama import Llama
from jaxserve.models.make import Make
from jaxserve.models.mistral import Mistral
from jaxserve.models.olmo2 import Olmo2
from jaxserve.models.olmo3 import Olmo3
from jaxserve.models.phi3 import Phi3
from jaxserve.models.qwen2 import Qwen2
from jaxserve.models.qwen3 import Qwen3
from jaxserve.models.rope_config import NO_ROPE
from jaxserve.models.smollm3 import SmolLM3
from jaxserve.models.vision.families import text_of, tower_of
from jaxserve.models.vision.tower import Tower, TowerConfig
from jaxserve.shown import quoted

_FAMILIES: tuple[tuple[str, str, type[Decoder]], ...] = (
    # architecture in config.json, its model_type, class
    ("Cohere2ForCausalLM", "cohere2", Cohere2),
    ("Gemma2ForCausalLM", "gemma2", Gemma2),
    ("Gemma3ForCausalLM", "gemma3_text", Gemma3),
    ("Glm4ForCausalLM", "glm4", Glm4),
    ("GlmForCausalLM", "glm", Glm),
    ("GraniteForCausalLM", "granite", Granite),
    ("LlamaForCausalLM", "llama", Llama),
    ("MistralForCausalLM", "mistral", Mistral),
    ("Olmo2ForCausalLM", "olmo2", Olmo2),
    ("Olmo3ForCausalLM", "olmo3", Olmo3),
    ("Phi3ForCausalLM", "phi3", Phi3),
    ("Qwen2ForCausalLM", "qwen2", Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Qwen3),
    ("SmolLM3ForCausalLM", "smollm3", SmolLM3),
    # with a tower beside it: see vision.families
    ("Gemma3ForConditionalGeneration", "gemma3", Gemma3),
    ("Idefics3ForConditionalGeneration", "idefics3", Llama),
    ("LlavaForConditionalGeneration", "llava", Llama),
    ("Qwen2VLForConditionalGeneration", "qwen2_vl", Qwen2),
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", Qwen2),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl", Qwen3),
    ("SmolVLMForConditionalGeneration", "smolvlm", Llama),
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
    hf = {**cls.hf_defaults, **text_of(hf, architecture)}
    fields = common_fields(hf, architecture, cls.ropes_by_kind) | cls.config_fields(hf)
    if cls.ropes_by_kind:
        fields |= {"layer_ropes": layer_ropes(hf, fields["rope"], fields["windows"])}
    config = cls.config_class(**fields)
    for rope in config.layer_ropes:
        rope.check(config.head_dim)
        if rope != NO_ROPE and rope.partial != 1 and not cls.rotates_part:
            raise NotSupportedError(
                f"partial_rotary_factor={rope.partial:g} is not supported for {architecture}, "
                "only 1"
            )
    return config


def tower_config_from_hf(hf: Mapping[str, Any], config: ModelConfig) -> TowerConfig | None:
    """The tower's sizes from the same dict; None for a model of text only.

    config: what `config_from_hf` made of it. Raises NotSupportedError, ModelLoadError as that does.
    """
    cls = tower_of(config.architecture)
    return None if cls is None else cls.read_config(hf, config)


@dataclasses.dataclass(frozen=True, eq=False)
class Declaration(Declared[ModelConfig, Decoder]):
    """A decoder without its arrays."""

    quantization: str | None
    """A scheme of models.quantization."""
    parts: int
    """Devices that the model is cut over; the parameters are those of one of them."""
    axis: str | None
    """Their mesh axis."""

    @functools.cached_property
    def scales(self) -> Mapping[str, str]:
        """Path of each quantized kernel -> path of its scale."""
        return {path: f"{path}_scale" for path in self.specs if f"{path}_scale" in self.specs}


class TowerDeclaration(Declared[TowerConfig, Tower]):
    """A tower without its arrays. Towers are neither quantized nor cut."""


def declare(
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    quantization: str | None = None,
    *,
    parts: int = 1,
    axis: str | None = None,
) -> Declaration:
    """The parameters of a model's decoder and how to bind them; allocates nothing.

    parts, axis: the model as one of so many devices along a mesh axis has it, see `Make`.
    dtype: of every parameter, see `Declaration`. quantization: a scheme of models.quantization;
    kernels of the layers' linear parts are then int8 or float8_e4m3fn, with a parameter
    `kernel_scale` beside each.
    Raises NotSupportedError for an unknown architecture or scheme.
    """
    cls = family(config.architecture)
    dtype = jnp.dtype(dtype)
    make = Make(dtype, None, quantization, parts, axis)
    structure = structure_of(lambda: cls(config, make))
    return Declaration(config, dtype, structure, quantization, parts, axis)


def declare_tower(config: TowerConfig, dtype: jax.typing.DTypeLike) -> TowerDeclaration:
    """The same of a model's tower: every device has all of it, in `dtype`."""
    cls = tower_of(config.architecture)
    if cls is None:
        raise NotSupportedError(f"architecture {config.architecture!r} has no tower")
    dtype = jnp.dtype(dtype)
    return TowerDeclaration(config, dtype, structure_of(lambda: cls(config, Make(dtype))))
