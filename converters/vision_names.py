"""Names of tensors in checkpoints with a tower. The same tensor has had several, by the version of
transformers that wrote it; the tables know one."""

from __future__ import annotations

import dataclasses

from converters.messages import plain
from converters.shards import Tensor
from converters.sources import SafetensorsSource
from converters.stored_array import StoredArray
from jaxserve.errors import ModelLoadError

_PREFIXES = (
    # in a checkpoint, in the tables; the first that fits counts
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.connector.", "connector."),
)
_DECODER = ("model.", "lm_head.")
"""How a decoder's tensors begin in the tables."""
_SECOND = (("vision_tower.vision_model.", "vision_tower."),)
_BEHIND_LANGUAGE_MODEL = (
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_BEHIND_MODEL = (
    ("model.", "model.text_model."),
    ("vision_model.", "model.vision_model."),
    ("connector.", "model.connector."),
)
_HUB: dict[str, tuple[tuple[str, str], ...]] = {
    # architecture: in the tables, as the families' makers write it, where they differ
    "Gemma3ForConditionalGeneration": _BEHIND_LANGUAGE_MODEL,
    "Idefics3ForConditionalGeneration": _BEHIND_MODEL,
    "LlavaForConditionalGeneration": _BEHIND_LANGUAGE_MODEL,
    "Qwen3VLForConditionalGeneration": (
        ("model.", "model.language_model."),
        ("visual.", "model.visual."),
    ),
    "SmolVLMForConditionalGeneration": _BEHIND_MODEL,
}


def table_name(name: str) -> str:
    """A checkpoint's name of a tensor -> that of the tables."""
    for prefixes in (_PREFIXES, _SECOND):
        found = next((pair for pair in prefixes if name.startswith(pair[0])), None)
        name = name if found is None else found[1] + name.removeprefix(found[0])
    return name


def hub_name(name: str, architecture: str) -> str:
    """The tables' name of a tensor -> the one that a saved checkpoint of `architecture` has."""
    for ours, theirs in _HUB.get(architecture, ()):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


class RenamedSource:
    """A safetensors folder whose tensors have the tables' names. Kernels of convolutions are read
    as [out, in]."""

    def __init__(self, source: SafetensorsSource, *, tower: bool):
        """tower: False leaves out all but the decoder's. Raises ModelLoadError where two tensors
        have the same name."""
        self._source = source
        self._stored: dict[str, str] = {}
        for stored in source.names():
            name = table_name(stored)
            if not tower and not name.startswith(_DECODER):
                continue
            if name in self._stored:
                both = f"{plain(self._stored[name])} and {plain(stored)}"
                raise ModelLoadError(f"{both} are two spellings of one tensor")
            self._stored[name] = stored

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored[name])

    def tensor(self, name: str) -> Tensor:
        array = self._source.tensor(self._stored[name])
        return array if len(array.shape) <= 2 else _flat(array)

    def close(self) -> None:
        self._source.close()


def _flat(array: StoredArray) -> StoredArray:
    first, *others = array.shape
    size = 1
    for other in others:
        size *= other
    return dataclasses.replace(array, shape=(first, size))
