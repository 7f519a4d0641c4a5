"""Model shapes and request lists of the figures in the README, the same for every engine.

Weights are random: only a config.json is written. Token ids are random and differ between cases
and seeds, so that no prefix is shared by accident. Output lengths are forced with ignore_eos.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA
    | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen2.5-0.5b": _QWEN2
    | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        "use_sliding_window": False, "tie_word_embeddings": True, "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "qwen3-0.6b": _QWEN3
    | {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "use_sliding_window": False,
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "smollm2-135m": _LLAMA
    | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "tiny": _QWEN2
    | {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "use_sliding_window": False,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def write_model(name: str, root: Path) -> Path:
    """A folder with the config.json of shape `name`, for load_format="dummy"."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name] | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def requests(case: str, vocab_size: int, seed: int = 0, scale: float = 1.0):
    """(prompt token ids, output length) of each request. `scale` < 1 keeps fewer requests.

    uniform: 256 x (512 in, 256 out). ragged: 512 x (32-1024 in, 32-512 out), the same lengths
    whatever the seed. prefix: 256 x (1,024 shared + 32 own in, 64 out). lat1, lat8: 128 in, 256
    out.
    """
    draw = random.Random(f"{case}/{seed}")

    def tokens(count: int) -> list[int]:
        return [draw.randrange(10, vocab_size - 300) for _ in range(count)]

    def scaled(count: int) -> int:
        return max(1, round(count * scale))

    if case == "uniform":
        return [(tokens(512), 256) for _ in range(scaled(256))]
    if case == "ragged":
        lengths = random.Random(7)
        shape = [(lengths.randint(32, 1024), lengths.randint(32, 512)) for _ in range(512)]
        return [(tokens(n), out) for n, out in shape[: scaled(512)]]
    if case == "prefix":
        shared = tokens(1024)
        return [(shared + tokens(32), 64) for _ in range(scaled(256))]
    if case.startswith("lat"):
        return [(tokens(128), 256) for _ in range(int(case[3:]))]
    raise ValueError(f"unknown case {case!r}")
