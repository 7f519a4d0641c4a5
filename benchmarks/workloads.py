"""Model shapes and request lists of the figures in the README, the same for every engine.

Weights are random: only a config.json is written. Token ids are random and differ between cases
and seeds, so that no prefix is shared by accident. Output lengths are forced with ignore_eos.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}

_LLAMA_3 = _LLAMA | {
    "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip

_QWEN2_5_7B = _QWEN2 | {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "use_sliding_window": False, "tie_word_embeddings": False, "bos_token_id": 151643,
    "eos_token_id": 151645,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3
    | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": _LLAMA_3
    | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen2.5-0.5b": _QWEN2
    | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        "use_sliding_window": False, "tie_word_embeddings": True, "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "qwen2.5-7b": _QWEN2_5_7B,
    "qwen3-0.6b": _QWEN3
    | {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "use_sliding_window": False,
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "qwen3-4b": _QWEN3
    | {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "use_sliding_window": False,
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "qwen3-8b": _QWEN3
    | {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "use_sliding_window": False,
        "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "smollm2-135m": _LLAMA
    | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262208,
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "sliding_window_pattern": 6, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "phi-3-mini": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu",
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 2047,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 32000, "pad_token_id": 32000,
    },
    "olmo-2-7b": {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_act": "silu",
        "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "eos_token_id": 100257, "pad_token_id": 100277,
    },
    "tiny": _QWEN2
    | {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "use_sliding_window": False,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip

TOWERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "qwen2.5-vl-7b": (
        "qwen2.5-7b",
        {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        [16, 24, 24],
    ),
    "tiny-vl": (
        "tiny",
        {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        [2, 3, 3],
    ),
}  # fmt: skip
"""Models with a vision tower: the decoder, one of SHAPES; `vision_config`; and how many of the
frequencies rotate by time, row and column."""
IMAGE_TOKEN = 3
"""Stands where an image is; `random_ids` does not draw it."""

THROUGHPUT = ("uniform", "uniform_s", "ragged", "ragged_s", "prefix", "long")
LATENCY = ("lat1", "lat1_s", "lat8")
CASES = (*THROUGHPUT, *LATENCY)
LONGEST = {"long": 8192 + 128}
"""Context a case needs where that is more than every shape has."""


def context_length(name: str, cases: Iterable[str] = ()) -> int:
    """Longest context of shape `name`, stretched where one of `cases` needs more."""
    needed = (LONGEST.get(case.removesuffix("_s"), 0) for case in cases)
    return max(SHAPES[name]["max_position_embeddings"], *needed, 0)


def decoder(name: str) -> str:
    """Which of SHAPES a model has, with or without a tower."""
    return TOWERS[name][0] if name in TOWERS else name


def with_tower(name: str) -> dict[str, Any]:
    """The config.json of one of TOWERS."""
    text, vision, sections = TOWERS[name]
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": sections}}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": SHAPES[text] | rope | {"model_type": "qwen2_5_vl_text"},
        "vision_config": vision,
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": IMAGE_TOKEN + 1,
        "vision_start_token_id": IMAGE_TOKEN + 2,
        "vision_end_token_id": IMAGE_TOKEN + 3,
    }


def write_model(name: str, root: Path, cases: Iterable[str] = ()) -> Path:
    """A folder with the config.json of one of SHAPES or TOWERS, for load_format="dummy"; a text
    model's allows `cases`."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if name in TOWERS:
        config = with_tower(name) | {"dtype": "bfloat16"}
    else:
        context = {"max_position_embeddings": context_length(name, cases)}
        config = SHAPES[name] | context | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def sampling(case: str) -> dict[str, Any]:
    """Sampling parameters of a case: greedy, but for names ending in _s."""
    return {"temperature": 0.8, "top_p": 0.95} if case.endswith("_s") else {"temperature": 0}


def random_ids(draw: random.Random, vocab_size: int, count: int) -> list[int]:
    """Token ids without the special ones at either end of a vocabulary."""
    return [draw.randrange(10, vocab_size - 300) for _ in range(count)]


def requests(
    case: str, vocab_size: int, seed: int = 0, scale: float = 1.0
) -> list[tuple[list[int], int]]:
    """(prompt token ids, output length) of each request. `scale` < 1 keeps fewer requests, though
    not of lat1 and lat8.

    uniform: 256 x (512 in, 256 out). ragged: 512 x (32-1024 in, 32-512 out), the same lengths
    whatever the seed. prefix: 256 x (1,024 shared + 32 own in, 64 out). long: 64 x (8,192 in, 128
    out). lat1, lat8: 1 and 8 x (128 in, 256 out). The sampled form of a case, its name with _s,
    has the same lengths and token ids of its own. ValueError: unknown case.
    """
    draw = random.Random(f"{case}/{seed}")
    base = case.removesuffix("_s")

    def tokens(count: int) -> list[int]:
        return random_ids(draw, vocab_size, count)

    def scaled(count: int) -> int:
        return max(1, round(count * scale))

    if base == "uniform":
        return [(tokens(512), 256) for _ in range(scaled(256))]
    if base == "ragged":
        lengths = random.Random(7)
        shape = [(lengths.randint(32, 1024), lengths.randint(32, 512)) for _ in range(512)]
        return [(tokens(n), out) for n, out in shape[: scaled(512)]]
    if base == "prefix":
        shared = tokens(1024)
        return [(shared + tokens(32), 64) for _ in range(scaled(256))]
    if base == "long":
        return [(tokens(8192), 128) for _ in range(scaled(64))]
    if base in ("lat1", "lat8"):
        return [(tokens(128), 256) for _ in range(int(base[3:]))]
    raise ValueError(f"unknown case {case!r}")
