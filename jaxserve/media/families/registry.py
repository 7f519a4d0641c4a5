"""Which family's image processor a model has."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxserve import checks
from jaxserve.errors import NotSupportedError
from jaxserve.media.families.family import Family
from jaxserve.media.families.gemma3 import Gemma3
from jaxserve.media.families.idefics3 import Idefics3
from jaxserve.media.families.llava import Llava
from jaxserve.media.families.qwen_vl import QwenVL

FAMILIES: Mapping[str, type[Family]] = MappingProxyType(
    {
        "Gemma3ForConditionalGeneration": Gemma3,
        "Idefics3ForConditionalGeneration": Idefics3,
        "LlavaForConditionalGeneration": Llava,
        "Qwen2VLForConditionalGeneration": QwenVL,
        "Qwen2_5_VLForConditionalGeneration": QwenVL,
        "Qwen3VLForConditionalGeneration": QwenVL,
        "SmolVLMForConditionalGeneration": Idefics3,
    }
)
"""By the architecture that config.json names."""


def sees_pictures(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json takes images."""
    return _architecture(config) in FAMILIES


def family_of(
    config: Mapping[str, Any], files: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> Family:
    """The image processor of a model; arguments and errors as `Family`. NotSupportedError also for
    an architecture that takes no images."""
    architecture = _architecture(config)
    family = FAMILIES.get(architecture)
    if family is None:
        raise NotSupportedError(
            f"the architecture {checks.quoted(architecture)} takes no images; "
            f"{', '.join(FAMILIES)} do"
        )
    return family(config, files, given)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list | tuple) and names else ""
