"""Hugging Face's own processing and model of a prompt with images, on the CPU in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tests.vision_models import FAMILIES, IMAGE, hf_model

PROCESSORS = {
    "qwen2_vl": "Qwen2VLImageProcessorPil",
    "qwen2_5_vl": "Qwen2VLImageProcessorPil",
    "qwen3_vl": "Qwen2VLImageProcessorPil",
    "gemma3": "Gemma3ImageProcessorPil",
    "smolvlm": "SmolVLMImageProcessorPil",
    "idefics3": "Idefics3ImageProcessorPil",
    "llava": "LlavaImageProcessorPil",
}
BIAS = 100.0
"""What is taken off the logits of the images' token: a prompt with one among its outputs would be
another prompt to Hugging Face."""


class HfVision:
    """One checkpoint's."""

    def __init__(self, family: str, folder: str, processor: dict[str, Any]) -> None:
        """processor: what preprocessor_config.json of the folder says."""
        import transformers

        self._family = family
        self.model = hf_model(family, folder)
        self._processor = getattr(transformers, PROCESSORS[family])(**processor)

    def logprobs(
        self, ids: Sequence[int], outputs: Sequence[int], images: Sequence[Image.Image]
    ) -> np.ndarray:
        """[outputs, V], with BIAS: from which each of `outputs` was drawn, behind expanded ids.
        (In one pass:
        what `generate` makes of a prompt that ends with an image is not that.)"""
        import torch

        with torch.no_grad():
            given = self._given([*ids, *outputs[:-1]], images)
            logits = self.model(**given).logits[0, len(ids) - 1 :]
        logits[:, IMAGE] -= BIAS
        return logits.log_softmax(-1).numpy()

    def hidden_states(self, ids: Sequence[int], images: Sequence[Image.Image]) -> np.ndarray:
        """[ids, D], behind the last norm."""
        import torch

        with torch.no_grad():
            return self.model.model(**self._given(ids, images)).last_hidden_state[0].numpy()

    def _given(self, ids: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Any]:
        import torch

        given: dict[str, Any] = {"input_ids": torch.tensor([[*ids]])}
        if images:
            given |= self._pixels(images)
        kinds = (given["input_ids"] == IMAGE).int()
        if self._family.startswith("qwen"):
            given["mm_token_type_ids"] = kinds
        elif self._family == "gemma3":
            given["token_type_ids"] = kinds
        return given

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        import torch

        kind = self._family
        given = [list(images)] if kind in ("smolvlm", "idefics3") else list(images)
        made = self._processor(given, return_tensors="np")
        names = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
        return {name: torch.tensor(np.asarray(made[name])) for name in names if name in made}


def families() -> list[str]:
    """All that there are."""
    return list(FAMILIES)
