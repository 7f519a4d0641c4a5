"""Images for tests, and configs of tiny models that see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((64, 64), (1, 1), (3, 90), (90, 3), (200, 120), (121, 333), (640, 481))
"""Widths and heights: square, tiny, tall, wide, odd."""
TEXT = {"hidden_size": 64, "vocab_size": 320}
QWEN2 = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": TEXT,
    "image_token_id": 300,
    "vision_config": {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
QWEN3 = {
    **QWEN2,
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "vision_config": {**QWEN2["vision_config"], "deepstack_visual_indexes": [0, 2]},
}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": TEXT,
    "image_token_index": 300,
    "boi_token_index": 302,
    "eoi_token_index": 303,
    "mm_tokens_per_image": 16,
    "vision_config": {"patch_size": 4, "image_size": 32},
}
IDEFICS3 = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "text_config": TEXT,
    "image_token_id": 300,
    "scale_factor": 2,
    "vision_config": {"patch_size": 4, "image_size": 32},
}
SMOLVLM = {**IDEFICS3, "architectures": ["SmolVLMForConditionalGeneration"]}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": TEXT,
    "image_token_index": 300,
    "vision_config": {"patch_size": 4, "image_size": 32},
}


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Coarse noise with some detail, so that filters differ."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    pixels = np.asarray(image) ^ random.integers(0, 32, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(random.integers(0, 256, (height, width), np.uint8)))
    return image.convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of its file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def text_of(content: bytes) -> str:
    """base64."""
    return base64.b64encode(content).decode()


def with_sizes(config: Mapping[str, Any], **vision: Any) -> dict[str, Any]:
    """A config whose vision_config says something else."""
    return {**config, "vision_config": {**config["vision_config"], **vision}}
