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
    "tiny": _QWEN2
    | {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "use_sliding_window": False,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


THROUGHPUT = ("uniform", "uniform_s", "ragged", "ragged_s", "prefix", "long")
LATENCY = ("lat1", "lat1_s", "lat8")
CASES = (*THROUGHPUT, *LATENCY)
LONGEST = {"long": 8192 + 128}
"""Context a case needs where that is more than every shape has."""


def context_length(name: str, cases: Iterable[str] = ()) -> int:
    """Longest context of shape `name`, stretched where one of `cases` needs more."""
    needed = (LONGEST.get(case.removesuffix("_s"), 0) for case in cases)
    return max(SHAPES[name]["max_position_embeddings"], *needed, 0)


def write_model(name: str, root: Path, cases: Iterable[str] = ()) -> Path:
    """A folder with the config.json of shape `name`, for load_format="dummy"; it allows `cases`."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
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
