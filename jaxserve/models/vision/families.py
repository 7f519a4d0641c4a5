"""Which tower an architecture has beside its decoder, and where its config.json has the decoder's
part."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.errors import NotSupportedError
from jaxserve.models import values
from jaxserve.shown import quoted

if TYPE_CHECKING:
    from jaxserve.models.vision.tower import Tower

_TOWERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # architecture in config.json, module and class of its tower, what `model_type` its text_config
    # may have
    ("Gemma3ForConditionalGeneration", "siglip.Gemma3Tower", ("gemma3_text",)),
    ("Idefics3ForConditionalGeneration", "siglip.Idefics3Tower", ("llama",)),
    ("LlavaForConditionalGeneration", "clip.LlavaTower", ("llama",)),
    ("Qwen2VLForConditionalGeneration", "qwen2_vl.Qwen2VLTower", ("qwen2_vl_text", "qwen2_vl")),
    (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen25_vl.Qwen25VLTower",
        ("qwen2_5_vl_text", "qwen2_5_vl"),
    ),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl.Qwen3VLTower", ("qwen3_vl_text",)),
    ("SmolVLMForConditionalGeneration", "siglip.Idefics3Tower", ("llama",)),
)
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "dtype", "torch_dtype")
"""Keys that count where the model's config has them, before those of its text_config."""


def tower_of(architecture: str) -> type[Tower] | None:
    """The tower's class; None for a model of text only."""
    return next((_imported(tower) for name, tower, _ in _TOWERS if name == architecture), None)


def _imported(tower: str) -> type[Tower]:
    """By name, when a model has it: most engines start without any."""
    module, name = tower.split(".")
    return getattr(importlib.import_module(f"jaxserve.models.vision.{module}"), name)


def text_of(hf: Mapping[str, Any], architecture: str) -> Mapping[str, Any]:
    """What of a config.json the decoder's class reads: all of it for a model of text only, else
    `text_config`, or all of it where an old file has none.

    Raises NotSupportedError where the text model is not the one that the architecture is for.
    """
    found = next((row for row in _TOWERS if row[0] == architecture), None)
    if found is None:
        return hf
    types, tower = found[2], _imported(found[1])
    if hf.get("text_config") is None:
        return {**tower.text_defaults, **hf}
    text = values.table(hf, "text_config")
    kind = text.get("model_type", types[0])
    if kind not in types:
        raise NotSupportedError(
            f"config.json: text_config: model_type={quoted(kind)} is not supported in "
            f"{architecture}; supported: {', '.join(types)}"
        )
    whole = {key: hf[key] for key in _OF_THE_WHOLE if hf.get(key) is not None}
    # files of transformers 4 say it in text_config, those of 5 beside it
    tied = values.flag(hf, "tie_word_embeddings") or values.flag(text, "tie_word_embeddings")
    return {**tower.text_defaults, **text, **whole, "tie_word_embeddings": tied}
