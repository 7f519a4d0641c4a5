"""Damaged GGUF files: each is a clear error that names the file, never a crash or a hang."""

from __future__ import annotations

import builtins
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from converters import gguf_config, gguf_tokenizer, gguf_weights
from converters.gguf_reader import GGUFFile
from jaxserve.errors import ModelLoadError, NotSupportedError
from tests import gguf_files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write_model(path)
    return path


def read_everything(path):
    gguf_config.read_config(str(path))
    gguf_tokenizer.build_tokenizer(str(path))
    source = gguf_weights.tensors(str(path))
    for name in source.names():
        gguf_files.read(source, name)


def test_header_equals_the_gguf_packages_reader(model):
    ours, theirs = GGUFFile.open(str(model)), GGUFReader(model)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, field in fields.items():
        value, expected = ours.metadata[key], field.contents()
        if isinstance(value, float):  # ours is the shortest decimal of the same float32
            value, expected = np.float32(value), np.float32(expected)
        np.testing.assert_array_equal(value, np.asarray(expected), key)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape[::-1].tolist())
        assert (info.type_id, info.offset) == (tensor.tensor_type, tensor.data_offset)


def test_a_float32_is_its_shortest_decimal(model):
    assert GGUFFile.open(str(model)).number("llama.attention.layer_norm_rms_epsilon") == 1e-6


def test_truncated_anywhere(model, tmp_path):
    data = model.read_bytes()
    header = min(info.offset for info in GGUFFile.open(str(model)).tensors.values())
    offsets = [0, 1, 3, 4, 6, 8, 12, 16, 23, 24, 28, *range(30, header, 211), header - 1]
    offsets += [header, header + 1, (header + len(data)) // 2, len(data) - 1]
    path = tmp_path / "cut.gguf"
    for offset in offsets:
        path.write_bytes(data[:offset])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf: .*(truncated|empty|not a GGUF)"):
            gguf_weights.tensors(str(path))
        if offset <= header:
            for read in (gguf_config.read_config, gguf_tokenizer.build_tokenizer):
                with pytest.raises(ModelLoadError, match=r"cut\.gguf: "):
                    read(str(path))


def test_truncation_says_where(model, tmp_path):
    data = model.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-1])
    with pytest.raises(ModelLoadError, match=rf"ends at byte {len(data)}, .* {len(data) - 1}"):
        gguf_weights.tensors(str(tmp_path / "cut.gguf"))


def test_flipped_bytes_never_escape_as_other_errors(model, tmp_path):
    data = bytearray(model.read_bytes())
    header = min(info.offset for info in GGUFFile.open(str(model)).tensors.values())
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, header, 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_everything(path)
        except (ModelLoadError, NotSupportedError) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelLoadError, match=r"nowhere\.gguf: no such file"):
        gguf_config.read_config(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(ModelLoadError, match="cannot be read"):
        gguf_config.read_config(str(tmp_path))


def test_wrong_magic(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"x\.gguf: not a GGUF file"):
        gguf_config.read_config(str(path))


@pytest.mark.parametrize(
    ("version", "message"),
    [((1).to_bytes(4, "little"), "version 1"), ((3).to_bytes(4, "big"), "big-endian")],
)
def test_other_versions(model, tmp_path, version, message):
    data = model.read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:4] + version + data[8:])
    with pytest.raises(NotSupportedError, match=message):
        gguf_config.read_config(str(path))


def test_split_files_are_refused_with_advice(tmp_path):
    path = tmp_path / "x.gguf"
    gguf_files.write_model(path, metadata={"split.count": 3})
    with pytest.raises(NotSupportedError, match=r"one of 3 parts.*merge"):
        gguf_config.read_config(str(path))


@pytest.mark.parametrize(
    "key",
    [
        "llama.embedding_length", "llama.block_count", "llama.context_length",
        "llama.feed_forward_length", "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)  # fmt: skip
def test_missing_config_keys(tmp_path, key):
    path = tmp_path / "x.gguf"
    gguf_files.write_model(path, without=(key,))
    with pytest.raises(ModelLoadError, match=rf"x\.gguf: metadata key {key} is missing"):
        gguf_config.read_config(str(path))


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges"])
def test_missing_tokenizer_keys(tmp_path, key):
    path = tmp_path / "x.gguf"
    gguf_files.write_model(path, without=(f"tokenizer.ggml.{key}",), vocab=400)
    with pytest.raises(ModelLoadError, match=rf"tokenizer\.ggml\.{key} is missing"):
        gguf_tokenizer.build_tokenizer(str(path))


def test_key_of_another_type(tmp_path):
    path = tmp_path / "x.gguf"
    gguf_files.write_model(path, metadata={"{arch}.block_count": "two"})
    with pytest.raises(ModelLoadError, match=r"block_count must be an integer, got 'two'"):
        gguf_config.read_config(str(path))


def test_gguf_package_is_an_extra(model, monkeypatch):
    real = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ModelLoadError, match=r"pip install jaxserve\[gguf\]"):
        gguf_weights.tensors(str(model))
    assert gguf_config.read_config(str(model))["num_hidden_layers"] == 2


def test_nothing_is_printed_without_torch(model):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from converters import gguf_config, gguf_tokenizer, gguf_weights\n"
        f"path = {str(model)!r}\n"
        "gguf_config.read_config(path); gguf_weights.tensors(path)\n"
        "t = gguf_tokenizer.build_tokenizer(path)\n"
        "t.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
