"""What a model folder may hold, and what happens to the rest: links, pipes, names that are paths,
files that shrink, headers and JSON made to be expensive. Each a ModelLoadError that names the file."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import converters
from converters import cli, files, json_files, locate
from converters.gguf_reader import GGUFFile
from converters.messages import shown, some_of
from converters.sources import SafetensorsSource
from converters.stored_array import StoredArray
from jaxserve.errors import InvalidRequestError, ModelLoadError, NotSupportedError
from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_model

INDEX = "model.safetensors.index.json"
SECRET = b"SECRET78" + bytes(100)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(make_checkpoint(tmp_path / "model", shards=2, num_hidden_layers=1))


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


def refused(path: Path, *fragments: str, load=converters.load) -> str:
    """The message with which `load` refuses `path`, soon."""
    started = time.perf_counter()
    with pytest.raises(ModelLoadError) as caught:
        load(str(path))
    assert time.perf_counter() - started < 10
    message = str(caught.value)
    assert len(message) < 10_000
    for fragment in fragments:
        assert fragment in message
    return message


def point_index_at(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))


class TestNamesAndLinks:
    @pytest.mark.parametrize(
        "name",
        ["../secret", "/etc/passwd", "sub/x.safetensors", "..", "", ".", "a\0b", "\ud800" * 99],
    )
    def test_an_index_names_plain_files_only(self, folder, secret, name):
        point_index_at(folder, name)
        message = refused(folder, INDEX, "plain name")
        assert "SECRET" not in message

    def test_a_shard_that_links_out_of_the_folder(self, folder, secret):
        shard = folder / "model-00001-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to(secret)
        message = refused(folder, str(shard), "outside the model's folder")
        assert "SECRET" not in message and str(secret) not in message

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
    def test_json_that_links_out_of_the_folder(self, folder, secret, name):
        (folder / name).unlink()
        (folder / name).symlink_to("../secret")
        refused(folder, name, "outside the model's folder")

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model"])
    def test_companions_that_link_out_are_neither_copied_nor_tokenized(
        self, folder, secret, tmp_path, capsys, name
    ):
        (folder / name).symlink_to(secret)
        assert cli.main([str(folder), str(tmp_path / "out")]) == 1
        assert f"{name}: a link to a file outside" in capsys.readouterr().err
        assert not (tmp_path / "out" / name).exists()
        refused(folder, name, "outside", load=converters.load_tokenizer)

    @pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file"])
    def test_a_tokenizer_config_names_no_files(self, folder, tmp_path, key):
        other = tmp_path / "other.json"
        other.write_bytes((folder / "tokenizer.json").read_bytes())
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {key: str(other)}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        refused(folder, "tokenizer_config.json", key, load=converters.load_tokenizer)

    def test_links_inside_the_folder_are_good(self, folder):
        for path in list(folder.iterdir()):
            path.rename(folder / f"blob-{path.name}")
            path.symlink_to(f"blob-{path.name}")
        for name in ("config.json", INDEX):
            assert converters.load(str(folder)).format == "safetensors", name
        assert len(converters.load_tokenizer(str(folder))) == 512

    def test_a_snapshot_of_the_hubs_cache_is_good(self, folder, tmp_path, secret):
        blobs = tmp_path / "models--owner--name" / "blobs"
        snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / f"{number}")
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        link = tmp_path / "model-link"
        link.symlink_to(snapshot)
        for path in (snapshot, link):
            assert converters.load(str(path)).format == "safetensors"
            assert len(converters.load_tokenizer(str(path))) == 512
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to("../../../secret")
        refused(snapshot, "config.json", "outside")

    def test_orbax_files_that_link_out(self, folder, tmp_path, secret):
        out = tmp_path / "orbax"
        converters.save(converters.load(str(folder)), out)
        for relative in ("params/final_norm.scale/0", "params/final_norm.scale/.zarray"):
            kept = (out / relative).read_bytes()
            (out / relative).unlink()
            (out / relative).symlink_to(secret)
            refused(out, relative, "outside")
            (out / relative).unlink()
            (out / relative).write_bytes(kept)
        converters.load(str(out))

    def test_a_gguf_in_a_folder_may_not_link_out_but_a_named_one_may(self, tmp_path):
        write_model(tmp_path / "real.gguf", layers=1)
        (tmp_path / "folder").mkdir()
        link = tmp_path / "folder" / "link.gguf"
        link.symlink_to(tmp_path / "real.gguf")
        refused(tmp_path / "folder", "link.gguf", "outside")
        assert converters.load(str(link)).format == "gguf"


class TestHub:
    """What is fetched of a repository that holds much else."""

    REPOSITORY = (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX,
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "params.json",
        "consolidated.safetensors", "consolidated.00.pth", "original/params.json", "README.md",
        "original/consolidated.00.safetensors", "onnx/model.safetensors", "sub/config.json",
        "adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin", "modeling_x.py",
        "fp16/tokenizer.json", "model.fp16.safetensors",
    )  # fmt: skip

    @pytest.fixture
    def fetched(self, monkeypatch, tmp_path, folder):
        """Names fetched of REPOSITORY, its files those of `folder` where that has them."""
        from huggingface_hub.utils import filter_repo_objects

        names: set[str] = set()
        revisions = []
        snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        present = list(self.REPOSITORY)

        def download(repo, *, revision, cache_dir, allow_patterns, ignore_patterns):
            revisions.append(revision)
            for name in filter_repo_objects(
                present, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ):
                names.add(name)
                if (folder / name).exists():
                    (snapshot / name).write_bytes((folder / name).read_bytes())
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return names, revisions, present

    def find(self, weights=True):
        return locate.find_local("owner/name", revision="v1", download_dir=None, weights=weights)

    def test_shards_index_config_and_tokenizer_only(self, fetched):
        names, revisions, _ = fetched
        self.find()
        assert names == {
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        }  # fmt: skip
        assert revisions == ["v1", "0123abc"]  # both parts are of one commit

    def test_without_an_index(self, fetched):
        names, _, present = fetched
        present.remove(INDEX)
        present[present.index("model-00001-of-00002.safetensors")] = "model.safetensors"
        present.remove("model-00002-of-00002.safetensors")
        self.find()
        weights = {name for name in names if name.endswith(".safetensors")}
        assert weights == {"model.safetensors"}

    def test_an_index_on_the_hub_names_no_paths_either(self, fetched, folder):
        point_index_at(folder, "original/consolidated.00.safetensors")
        with pytest.raises(ModelLoadError, match="plain name"):
            self.find()

    def test_no_weights_for_a_tokenizer(self, fetched):
        names, revisions, _ = fetched
        self.find(weights=False)
        assert not any("safetensors" in name for name in names - {INDEX})
        assert revisions == ["v1"]
