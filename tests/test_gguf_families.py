"""A checkpoint as llama.cpp's converter would write it, against the safetensors that it is of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter, Keys

import converters
from converters import gguf_rope
from converters.gguf_config import read_config
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import registry
from tests import gguf_files
from tests.checkpoints import make_checkpoint, make_weights

ARCHS = {
    "phi3": gguf.MODEL_ARCH.PHI3,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "cohere2": gguf.MODEL_ARCH.COHERE2,
}
CASES = {
    "phi3": ("phi3", {}),
    "phi3, unscaled, a window": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_window": 9,
            "tie_word_embeddings": True,
        },
    ),
    "glm4": ("glm4", {"head_dim": 32}),
    "cohere2": (
        "cohere2",
        {"sliding_window_pattern": 4, "num_hidden_layers": 5, "tie_word_embeddings": True},
    ),
}


def metadata(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The keys that the converter writes of a config.json, {arch} to be filled in."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    pairs = {
        Keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        Keys.LLM.EMBEDDING_LENGTH: config["hidden_size"],
        Keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        Keys.LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        Keys.LLM.VOCAB_SIZE: config["vocab_size"],
        Keys.Attention.HEAD_COUNT: heads,
        Keys.Attention.HEAD_COUNT_KV: config["num_key_value_heads"],
        Keys.Rope.FREQ_BASE: rope["rope_theta"],
        Keys.Rope.DIMENSION_COUNT: int(partial * head_dim),
    }
    if "head_dim" in config:
        pairs |= {Keys.Attention.KEY_LENGTH: head_dim, Keys.Attention.VALUE_LENGTH: head_dim}
    if family == "cohere2":
        return pairs | {
            Keys.Attention.LAYERNORM_EPS: config["layer_norm_eps"],
            Keys.Attention.SLIDING_WINDOW: config["sliding_window"],
            Keys.LLM.LOGIT_SCALE: config["logit_scale"],
            Keys.Rope.SCALING_TYPE: "none",
        }
    pairs[Keys.Attention.LAYERNORM_RMS_EPS] = config["rms_norm_eps"]
    if family == "phi3":
        pairs[Keys.Attention.SLIDING_WINDOW] = config["sliding_window"] or 0
        pairs[Keys.Rope.SCALING_ORIG_CTX_LEN] = config["original_max_position_embeddings"]
    return pairs


def write(path: Path, folder: Path, family: str, more: dict[str, Any] | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(str(path), family)
    pairs = metadata(config, family) | {"general.name": "tiny"} | (more or {})
    for key, value in pairs.items():
        gguf_files.add_pair(writer, key.format(arch=family), value)
    names = gguf.get_tensor_name_map(ARCHS[family], config["num_hidden_layers"])
    tensors = {}
    for name, tensor in make_weights(config).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        tensors[known] = tensor
    rope = config["rope_parameters"]
    for name, key in ((gguf_rope.SHORT, "short_factor"), (gguf_rope.LONG, "long_factor")):
        if key in rope:
            tensors[name] = np.array(rope[key], np.float32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    gguf_files.finish(writer)


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_as_from_safetensors(name, tmp_path):
    family, overrides = CASES[name]
    folder = tmp_path / "hf"
    make_checkpoint(folder, family, tokenizer=False, **overrides)
    write(tmp_path / "tiny.gguf", folder, family)
    theirs = converters.load(str(folder))
    ours = converters.load(str(tmp_path / "tiny.gguf"))
    assert list(ours.params) == list(theirs.params)
    for path, array in theirs.params.items():
        np.testing.assert_array_equal(np.asarray(ours.params[path]), np.asarray(array), path)
    mine, other = (dataclasses.asdict(loaded.config) for loaded in (ours, theirs))
    turns = [
        [rope == loaded.config.rope for rope in loaded.config.layer_ropes]
        for loaded in (ours, theirs)
    ]
    assert mine.pop("layer_ropes") and other.pop("layer_ropes") and turns[0] == turns[1]
    mine, other = mine | mine.pop("rope"), other | other.pop("rope")
    assert mine.keys() == other.keys()
    # of special tokens, the tokenizer that this file lacks would tell
    for field in mine.keys() - {"bos_token_id", "eos_token_ids", "original_max_positions"}:
        numbers = isinstance(other[field], (float, tuple)) and field != "windows"
        want = pytest.approx(other[field], rel=1e-6) if numbers else other[field]
        assert mine[field] == want, field


def test_the_converters_attention_factor_is_taken(tmp_path):
    folder = tmp_path / "hf"
    make_checkpoint(folder, "phi3", tokenizer=False)
    for given in (None, 1.25):
        more = {} if given is None else {"{arch}.rope.scaling.attn_factor": given}
        write(tmp_path / "tiny.gguf", folder, "phi3", more)
        rope = registry.config_from_hf(read_config(str(tmp_path / "tiny.gguf"))).rope
        default = (1 + np.log(1024 / 64) / np.log(64)) ** 0.5
        assert rope.attention_factor == pytest.approx(given or default, rel=1e-6)
        assert (rope.long, rope.within(64).long) == (True, False)


@pytest.mark.parametrize(
    ("family", "more", "error", "match"),
    [
        (
            "cohere2",
            {"{arch}.rope.dimension_count": 8, Keys.Attention.KEY_LENGTH: 16},
            NotSupportedError,
            "8 of 16: a partial",
        ),
        ("glm4", {"{arch}.rope.dimension_count": 32}, NotSupportedError, "32 of 16: a partial"),
        ("glm4", {"{arch}.logit_scale": 2.0}, NotSupportedError, r"logit_scale=2 is not"),
        ("glm4", {"{arch}.attention.sliding_window": 7}, NotSupportedError, "which layers"),
        ("phi3", {"{arch}.rope.scaling.type": "yarn"}, ModelLoadError, "YaRN needs"),
        (
            "phi3",
            {"{arch}.rope.scaling.original_context_length": 0},
            ModelLoadError,
            "original_max_position_embeddings must be a positive integer",
        ),
    ],
)
def test_refused(family, more, error, match, tmp_path):
    folder = tmp_path / "hf"
    make_checkpoint(folder, family, tokenizer=False, tie_word_embeddings=True)
    write(tmp_path / "tiny.gguf", folder, family, more)
    with pytest.raises(error, match=match):
        registry.config_from_hf(read_config(str(tmp_path / "tiny.gguf")))
