"""Tiny random checkpoints of models that take pictures, as Hugging Face's own classes write them,
and pictures for them.

    path = make("qwen2_vl", tmp_path / "m", tie_word_embeddings=True)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.media.picture import Shape
from jaxserve.models.vision.tower import TowerConfig

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = 300
"""Token that stands where a picture is."""
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return {"rope_parameters": rope | more}


@dataclasses.dataclass(frozen=True)
class Family:
    """One that takes pictures."""

    name: str
    """Of Hugging Face's classes, before "Config"."""
    config: dict[str, Any]
    """Of its Config."""
    shapes: tuple[Shape, ...]
    """Pictures of different sizes that its tower takes together."""


_QWENS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 4,
}
_SIZES = (Shape(1, 4, 6), Shape(1, 2, 2), Shape(1, 12, 10))
_TILES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
_TILED = {
    "text_config": {"model_type": "llama"} | TEXT,
    "vision_config": _TILES,
    "scale_factor": 2,
    "image_token_id": IMAGE,
}
_WHOLE = (Shape(1, 8, 8),) * 3
FAMILIES = {
    "gemma3": Family(
        "Gemma3",
        {
            "text_config": TEXT
            | {
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 8,
                "num_hidden_layers": 7,
            },
            "vision_config": _TILES,
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE,
            "boi_token_index": 302,
            "eoi_token_index": 303,
        },
        _WHOLE,
    ),
    "smolvlm": Family("SmolVLM", _TILED, (Shape(1, 8, 8), Shape(3, 8, 8))),
    "idefics3": Family("Idefics3", _TILED, (Shape(1, 8, 8), Shape(3, 8, 8))),
    "llava": Family(
        "Llava",
        {
            "text_config": {"model_type": "llama"} | TEXT,
            "vision_config": _TILES
            | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 32},
            "vision_feature_layer": -2,
            "image_token_index": IMAGE,
            "image_seq_length": 64,
        },
        _WHOLE,
    ),
    "qwen2_vl": Family(
        "Qwen2VL",
        {
            "text_config": TEXT | _rope(2, 3, 3),
            "vision_config": {
                "depth": 3,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            **_IDS,
        },
        _SIZES,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VL",
        {
            "text_config": TEXT | _rope(2, 3, 3),
            "vision_config": {
                **_QWENS,
                "depth": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 2,
            },
            **_IDS,
        },
        _SIZES,
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        {
            "text_config": TEXT | {"head_dim": 16} | _rope(4, 2, 2, mrope_interleaved=True),
            "vision_config": {
                **_QWENS,
                "depth": 3,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 2],
            },
            **_IDS,
        },
        _SIZES,
    ),
}


def make(family: str, folder: str | Path, *, seed: int = 0, **overrides: Any) -> str:
    """Saves a model of random weights, norms and biases included. overrides: of its Config; a dict
    changes some keys of text_config or vision_config. Returns the folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    name, given = FAMILIES[family].name, dict(FAMILIES[family].config)
    for key, value in overrides.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) else value
    config = getattr(transformers, f"{name}Config")(**given)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            one = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            parameter.copy_(one + 0.15 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return str(folder)


def hf_model(family: str, folder: str) -> Any:
    """The torch module of a saved folder, float32."""
    import torch
    import transformers

    cls = getattr(transformers, f"{FAMILIES[family].name}ForConditionalGeneration")
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def pictures(config: TowerConfig, shapes: Sequence[Shape]) -> np.ndarray:
    """Random patches of pictures, one behind the other: [P, C * p * p] float32."""
    rng = np.random.default_rng(sum(shape.patches for shape in shapes))
    patches = sum(shape.patches for shape in shapes)
    return rng.standard_normal((patches, config.patch_width)).astype(np.float32)


def hf_inputs(family: str, config: TowerConfig, shapes: Sequence[Shape], patches: np.ndarray):
    """The same as Hugging Face's modules take them."""
    import torch

    if family.startswith("qwen"):
        frames = patches.reshape(len(patches), config.channels, 1, -1).repeat(2, axis=2)
        grid = [[shape.tiles, shape.height, shape.width] for shape in shapes]
        return {
            "pixel_values": torch.from_numpy(frames.reshape(len(patches), -1)),
            "image_grid_thw": torch.tensor(grid),
        }
    side, patch = shapes[0].height, config.patch_size
    tiles = patches.reshape(-1, side, side, config.channels, patch, patch)
    pixels = tiles.transpose(0, 3, 1, 4, 2, 5).reshape(
        len(tiles), config.channels, side * patch, -1
    )
    whole = torch.from_numpy(pixels.copy())
    return {"pixel_values": whole[None] if family in ("smolvlm", "idefics3") else whole}


def hf_rows(family: str, model: Any, inputs: dict[str, Any]) -> np.ndarray:
    """What Hugging Face's tower makes of them: [tokens, rows * D]."""
    import torch

    with torch.no_grad():
        out = model.model.get_image_features(**inputs)

    def joined(rows: Any) -> Any:
        rows = rows if isinstance(rows, torch.Tensor) else torch.cat(list(rows))
        return rows.reshape(-1, rows.shape[-1])

    deep = getattr(out, "deepstack_features", None) or ()
    return torch.cat([joined(out.pooler_output), *map(joined, deep)], dim=-1).numpy()


CHAT_OF_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's."""


def make_speaking(folder: str | Path) -> str:
    """A Qwen2-VL with all that a user's folder has: tokenizer, chat template, sizes of images."""
    from tokenizers import AddedToken, Tokenizer

    from tests.checkpoints import VOCAB, write_tokenizer

    folder = Path(folder)
    ids = {name: VOCAB + number for number, name in enumerate(_IDS)}
    make("qwen2_vl", folder, text_config={"vocab_size": VOCAB + len(ids)}, **ids)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_OF_PARTS, encoding="utf-8")
    sizes = {"shortest_edge": 64, "longest_edge": 64 * 40}
    processor = {"size": sizes, "patch_size": 4, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return str(folder)
