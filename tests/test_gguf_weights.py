"""GGUF tensors, against what was written, the gguf package, and transformers' two readers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.gguf import dequant
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import converters
from converters import gguf_weights
from converters.gguf_families import ONE_PLUS
from examples.demo_model import fetch
from jaxserve.errors import ModelLoadError, NotSupportedError
from tests import gguf_files

UNREADABLE = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
PLAIN = ("F32", "F16", "BF16")
OTHERS = ("qwen2", "qwen3", "gemma2", "granite", "olmo2", "smollm3")
"""Architectures beside llama and gemma3, written with byte-level tokenizers."""


def can(function, kind):
    data = np.zeros((1, 256), np.float32)
    if function is gguf.dequantize:
        data = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        function(data, kind)
    except NotImplementedError:
        return False
    return True


QUANTIZABLE = [kind for kind in GGMLQuantizationType if can(gguf.quantize, kind)]
READABLE = [
    kind for kind in GGMLQuantizationType if kind.name not in PLAIN and can(gguf.dequantize, kind)
]


def tensors_of_transformers(path):
    """What from_pretrained(gguf_file=...) loads, without the accelerate package it asks for."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


def assert_equals_transformers(path):
    theirs = tensors_of_transformers(path)
    source = gguf_weights.tensors(str(path))
    assert set(source.names()) == set(theirs)
    for name in source.names():
        assert source.shape(name) == tuple(theirs[name].shape)
        np.testing.assert_array_equal(gguf_files.read(source, name), theirs[name].numpy(), name)
    source.close()


@pytest.mark.long
def test_smollm2_equals_transformers_weight_for_weight():
    assert_equals_transformers(fetch())


@pytest.mark.parametrize("kind", QUANTIZABLE, ids=lambda kind: kind.name)
def test_every_type_that_can_be_written(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    written = gguf_files.write_model(
        path, hidden=256, mlp=256, head_dim=64, layers=1, quantization=kind
    )
    source = gguf_weights.tensors(str(path))
    assert set(source.names()) == set(written)
    for name, value in written.items():
        got = gguf_files.read(source, name)
        assert got.shape == source.shape(name) == value.shape
        # Rows are quantized by themselves, so their order does not matter to the values.
        expected = value
        if value.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(value, kind), kind)
            half = {"F16": np.dtype(np.float16), "BF16": "bfloat16"}.get(kind.name)
            assert got.dtype == (half or np.float32)
        np.testing.assert_array_equal(got.astype(np.float32), expected, name)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_that_can_be_read(tmp_path, monkeypatch, kind):
    """Random blocks, those that only llama.cpp can write included; in several chunks."""
    monkeypatch.setattr(gguf_weights, "_CHUNK", 3 * 512)
    block, size = GGML_QUANT_SIZES[kind]
    # Small bytes: as float16 scales they are small numbers, not infinities.
    raw = np.random.default_rng(2).integers(0, 60, (10, 512 // block * size), dtype=np.uint8)
    path = tmp_path / "blocks.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_head_count(1)
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    gguf_files.finish(writer)
    got = gguf_files.read(gguf_weights.tensors(str(path)), "lm_head.weight")
    assert got.shape == (10, 512)
    np.testing.assert_array_equal(got, gguf.dequantize(raw, kind))
    if kind in dequant.GGML_BLOCK:  # transformers' own implementation, in torch
        theirs = dequant.dequantize(torch.from_numpy(raw.reshape(-1)), int(kind))
        np.testing.assert_allclose(got.ravel(), theirs.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_types_are_refused_at_opening(tmp_path, name):
    kind = GGMLQuantizationType[name]
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_head_count(1)
    raw = np.zeros((4, 256 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]), np.uint8)
    if name in ("I8", "I16", "I32", "I64", "F64"):
        raw = raw.view({"F64": np.float64}.get(name, f"int{name[1:]}"))
        writer.add_tensor("output.weight", raw)
    else:
        writer.add_tensor("output.weight", raw, raw_dtype=kind)
    gguf_files.finish(writer)
    with pytest.raises(NotSupportedError, match=rf"output\.weight has ggml type {name}"):
        gguf_weights.tensors(str(path))


@pytest.mark.parametrize(
    ("arch", "tokenizer"),
    [("llama", "llama"), ("gemma3", "llama"), *((arch, "gpt2") for arch in OTHERS)],
)
def test_names_and_row_order_per_architecture(tmp_path, arch, tokenizer):
    path = tmp_path / "tiny.gguf"
    biases = ("q_proj", "k_proj", "v_proj", "o_proj") if arch == "llama" else None
    written = gguf_files.write_model(path, arch, tokenizer=tokenizer, biases=biases)
    source = gguf_weights.tensors(str(path))
    assert set(source.names()) == set(written)
    for name, value in written.items():
        found = gguf_files.read(source, name)
        if arch in ONE_PLUS and "norm" in name:  # what is used is kept, the sum
            found, value = 1 + found, 1 + value
        np.testing.assert_array_equal(found, value, name)


def test_norms_that_are_one_and_more(tmp_path):
    """Without the 1 as tensors, and with it as parameters: bit for bit those of the file."""
    path = tmp_path / "tiny.gguf"
    written = gguf_files.write_model(path, "gemma2", layers=4)
    params = converters.load(str(path), dtype="bfloat16").params
    for ours, name in (
        ("final_norm", "model.norm"),
        ("layers.1.input_norm", "model.layers.1.input_layernorm"),
        ("layers.1.post_norm", "model.layers.1.pre_feedforward_layernorm"),
        ("layers.1.attn.out_norm", "model.layers.1.post_attention_layernorm"),
        ("layers.1.mlp.out_norm", "model.layers.1.post_feedforward_layernorm"),
    ):
        found = params[f"{ours}.scale"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(found), 1 + written[f"{name}.weight"], ours)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_tiny_models_equal_transformers(tmp_path, arch):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path, arch, tied=arch in ONE_PLUS)
    assert_equals_transformers(path)


def test_permutation_round_trip():
    rng = np.random.default_rng(3)
    for heads, head_dim, rest in ((1, 2, ()), (4, 8, (5,)), (3, 64, (7,))):
        value = rng.standard_normal((heads * head_dim, *rest))
        stored = gguf_files.permute(value, heads)
        np.testing.assert_array_equal(gguf_weights.unpermute(stored, heads), value)
        # The converter's own formula.
        reference = value.reshape(heads, 2, head_dim // 2, *rest).swapaxes(1, 2)
        np.testing.assert_array_equal(stored, reference.reshape(value.shape))


def test_unknown_tensors_keep_their_names_and_rope_factors_are_no_parameter(tmp_path):
    path = tmp_path / "tiny.gguf"
    extra = {name: np.ones(8, np.float32) for name in ("rope_freqs.weight", "blk.0.strange.weight")}
    gguf_files.write_model(path, extra=extra)
    names = gguf_weights.tensors(str(path)).names()
    assert "blk.0.strange.weight" in names and "rope_freqs.weight" not in names


def test_plain_tensors_survive_close(tmp_path):
    path = tmp_path / "tiny.gguf"
    written = gguf_files.write_model(path)
    source = gguf_weights.tensors(str(path))
    value = gguf_files.read(source, "model.norm.weight")
    source.close()
    np.testing.assert_array_equal(value, written["model.norm.weight"])
    with pytest.raises(ModelLoadError, match="after close"):
        gguf_files.read(source, "model.norm.weight")


def test_rows_that_do_not_fit_the_heads(tmp_path):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path, metadata={"llama.attention.head_count": 3})
    source = gguf_weights.tensors(str(path))
    with pytest.raises(ModelLoadError, match=r"attn_q\.weight .* 3 heads"):
        gguf_files.read(source, "model.layers.0.self_attn.q_proj.weight")


def test_unsupported_architecture(tmp_path):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_model(path, "starcoder2")
    with pytest.raises(NotSupportedError, match="starcoder2"):
        gguf_weights.tensors(str(path))
