"""What a model folder may hold, and what happens to the rest: links, pipes, names that are paths,
files that shrink, headers and JSON made to be expensive. Each a ModelLoadError with its name."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import converters
from converters import cli, files, json_files, locate
from converters.gguf_reader import GGUFFile
from converters.messages import some_of
from converters.sources import SafetensorsSource
from converters.stored_array import StoredArray
from jaxserve.errors import InvalidRequestError, ModelLoadError, NotSupportedError
from jaxserve.shown import quoted
from tests.checkpoints import make_checkpoint
from tests.fuzz.files import Peak
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
    started, computed = time.perf_counter(), time.process_time()
    with pytest.raises(ModelLoadError) as caught:
        load(str(path))
    # the process's own time where that is less: the machine may be busy
    elapsed = time.perf_counter() - started
    assert min(elapsed, time.process_time() - computed) < 5 and elapsed < 60
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
        ["../secret", "/etc/passwd", "sub/x.safetensors", "..", "", ".", "a\0b", "x" * 300],
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

    @pytest.mark.parametrize("name", ["../tokenizer.4.0.0.json", "/etc/tokenizer.4.0.0.json"])
    def test_a_tokenizer_config_names_plain_files_only(self, folder, name):
        (folder.parent / "tokenizer.4.0.0.json").write_bytes(
            (folder / "tokenizer.json").read_bytes()
        )
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for value in ([name], ["x", name], name, [5]):
            text = json.dumps(config | {"fast_tokenizer_files": value})
            (folder / "tokenizer_config.json").write_text(text)
            refused(
                folder,
                "tokenizer_config.json: fast_tokenizer_files",
                load=converters.load_tokenizer,
            )

    def test_templates_that_link_out(self, folder, tmp_path, secret):
        templates = folder / "additional_chat_templates"
        (tmp_path / "elsewhere").mkdir()
        templates.symlink_to(tmp_path / "elsewhere")
        refused(folder, "additional_chat_templates", "outside", load=converters.load_tokenizer)
        templates.unlink()
        templates.mkdir()
        (templates / "tool.jinja").symlink_to(secret)
        refused(folder, "tool.jinja", "outside", load=converters.load_tokenizer)

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
                good = folder / name
                (snapshot / name).write_bytes(good.read_bytes() if good.exists() else b"x")
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


TRUNCATING = """
import os, sys
import converters, converters.files as files

path, at = sys.argv[2], int(sys.argv[3])
read = files.OpenFile.read_into
done = 0

def read_and_cut(self, out, offset):
    global done
    done += 1
    if done == at:
        os.truncate(path, os.stat(path).st_size // 2)
    read(self, out, offset)

files.OpenFile.read_into = read_and_cut
try:
    converters.load(sys.argv[1])
except converters.load.__globals__["ModelLoadError"] as error:
    print(error)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """hf/, orbax/ and model.gguf, good ones."""
    base = tmp_path_factory.mktemp("made")
    make_checkpoint(base / "hf", num_hidden_layers=1, tokenizer=False)
    converters.save(converters.load(str(base / "hf")), base / "orbax")
    write_model(base / "model.gguf", layers=1)
    return base


class TestFilesThatChange:
    """In processes of their own: a fault in a mapped page would end the process."""

    @pytest.mark.parametrize(
        ("model", "file", "at"),
        [
            ("hf", "hf/model.safetensors", 5),
            ("orbax", "orbax/params/embed.embedding/0.0", 12),
            ("model.gguf", "model.gguf", 4),
        ],
    )
    def test_truncated_while_it_loads(self, made, tmp_path, model, file, at):
        copy = tmp_path / "copy"
        subprocess.run(["cp", "-r", str(made), str(copy)], check=True)
        run = subprocess.run(
            [sys.executable, "-c", TRUNCATING, str(copy / model), str(copy / file), str(at)],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert str(copy / file) in run.stdout
        assert re.search("truncated|changed while it was read|bytes long", run.stdout), run.stdout

    def test_written_to_while_it_loads(self, made, tmp_path):
        """The bytes are there, but some are of another model."""
        path = tmp_path / "x.safetensors"
        path.write_bytes((made / "hf" / "model.safetensors").read_bytes())
        source = SafetensorsSource(tmp_path)
        source.tensor("model.norm.weight").read()
        os.utime(path, (1, 1))
        with pytest.raises(ModelLoadError, match=r"x\.safetensors: changed while it was read"):
            source.tensor("model.norm.weight").read()
        source.close()

    @pytest.mark.parametrize(
        "name", ["config.json", "model-00001-of-00002.safetensors", INDEX, "generation_config.json"]
    )
    def test_a_pipe_is_refused_and_not_waited_for(self, folder, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, name, "a pipe, not a regular file")

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
    def test_nor_does_the_tokenizer_wait(self, folder, name):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused(folder, name, "a pipe", load=converters.load_tokenizer)

    def test_a_pipe_that_takes_the_place_of_a_file_between_two_looks(self, folder, monkeypatch):
        path = folder / "config.json"
        lstat = os.lstat

        def swap(looked):
            status = lstat(looked)
            if str(looked) == str(path) and path.is_file():
                path.unlink()
                os.mkfifo(path)
            return status

        monkeypatch.setattr("converters.files.os.lstat", swap)
        with pytest.raises(ModelLoadError, match=r"config\.json: cannot be read: a pipe"):
            files.open_inside(folder, "config.json")

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_a_gguf_that_is_none(self, tmp_path, make):
        make(tmp_path / "model.gguf")
        refused(tmp_path / "model.gguf", "model.gguf")
        refused(tmp_path, "model.gguf", "not a regular file")

    def test_devices_folders_and_loops(self, folder):
        with pytest.raises(ModelLoadError, match=r"/dev/zero: cannot be read: a device"):
            files.open_named(Path("/dev/zero"))
        for make, why in (
            (lambda path: path.mkdir(), "a folder, not a regular file"),
            (lambda path: path.symlink_to(path.name), "cannot be read"),
            (lambda path: path.symlink_to("nowhere"), "no such file"),
        ):
            path = folder / "config.json"
            path.unlink() if not path.is_dir() else path.rmdir()
            make(path)
            refused(folder, "config.json", why)


def header_of(count: int, name: str = "tensor.{}") -> bytes:
    entry = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = "{" + ",".join(entry % name.format(i) for i in range(count)) + "}"
    return struct.pack("<Q", len(text)) + text.encode() + bytes(4)


class TestBombs:
    """Time and memory follow what the file is worth, and so does the message."""

    @pytest.mark.parametrize(
        ("count", "why"),
        [(1_000_000, "longer than"), (300_000, "elements"), (50_000, "49,980 more")],
    )
    def test_a_header_of_many_tensors(self, made, tmp_path, count, why):
        good = (made / "hf" / "model.safetensors").read_bytes()
        length = int.from_bytes(good[:8], "little")
        header = good[8 : 8 + length].rstrip()[:-1] + b"," + header_of(count)[9:-4]
        (tmp_path / "config.json").write_bytes((made / "hf" / "config.json").read_bytes())
        data = struct.pack("<Q", len(header)) + header + good[8 + length :]
        (tmp_path / "model.safetensors").write_bytes(data)
        with Peak() as peak:
            refused(tmp_path, str(tmp_path), why)
        assert peak.bytes < 400 << 20

    def test_names_as_long_as_the_file(self, folder):
        (folder / "x.safetensors").write_bytes(header_of(3, "n" * 1_000_000 + "{}"))
        point_index_at(folder, "x.safetensors")
        refused(folder, "nnn")

    @pytest.mark.parametrize("text", ["[" * 15_000_000, "{},", "[]," * 5_000_000])
    def test_json_that_grows_when_parsed(self, folder, text):
        (folder / "config.json").write_text('{"a": ' + text)
        refused(folder, "config.json: cannot be read as JSON")

    def test_a_config_of_a_gigabyte(self, folder):
        os.truncate(folder / "config.json", 1 << 30)  # a hole: it takes no room
        refused(folder, "config.json: 1,073,741,824 bytes long")
        os.truncate(folder / "config.json", 0)
        os.truncate(folder / "tokenizer.json", 1 << 30)
        refused(folder, "tokenizer.json: 1,073", load=converters.load_tokenizer)

    @pytest.mark.parametrize(
        ("at", "value", "why"),
        [
            (8, 2**63, "claims"), (8, 200_000, "claims 200,000 tensors"), (16, 2**63, "metadata"),
            (24, 2**63, "ends at byte"),
        ],
    )  # fmt: skip
    def test_counts_and_lengths_of_a_gguf(self, tmp_path, at, value, why):
        path = tmp_path / "x.gguf"
        write_model(path, layers=1)
        data = bytearray(path.read_bytes())
        data[at : at + 8] = struct.pack("<Q", value)
        path.write_bytes(data)
        refused(path, "x.gguf", why)

    @pytest.mark.parametrize(
        ("kind", "count", "why"),
        [
            (8, 4_000_000, "more than 2,000,000 strings"),
            (4, 2**40, "metadata key k ends"),
            (9, 10, "unknown value type 9"),
            (8, 2**61, "metadata key k ends"),
            (99, 1, "unknown value type 99"),
        ],
    )
    def test_arrays_of_a_gguf(self, tmp_path, kind, count, why):
        """Strings: eight bytes each in the file, ten times that in memory."""
        path = tmp_path / "x.gguf"
        with path.open("wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1))
            file.write(struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, count))
            file.truncate(40 << 20)
        with Peak() as peak:
            refused(path, "x.gguf", why, load=GGUFFile.open)
        assert peak.bytes < 400 << 20

    def test_messages_are_short(self):
        for value in (
            "a" * 10**6,
            10**4000,
            [1] * 10**6,
            {"a": "b" * 1000},
            b"x" * 1000,
            2.0**1000,
        ):
            assert len(quoted(value)) < 400
        assert some_of(str(i) for i in range(30)).endswith(", 19, and 10 more")
        assert some_of(["a", "b"]) == "a, b"
        assert len(some_of(["n" * 10**6] * 10**5)) < 10_000


WRONG = {
    "a list": [1], "a number": 5, "a string": "x", "null": None, "a huge number": 10**400,
    "an object": {"a": 1},
}  # fmt: skip


class TestWrongTypes:
    """Files that are JSON, and mean nothing: the error names file, key and value."""

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (b"[" * 200_000, "nested too deeply"),
            (b'{"a":' * 200_000, "nested too deeply"),
            (b"[]", "should hold a JSON object, holds list"),
            (b"null", "holds NoneType"),
            (b"", "cannot be read as JSON"),
            (b"\xff\xfe{}", "byte 0 is not UTF-8"),
            (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        ],
    )
    def test_no_object(self, folder, name, text, why):
        (folder / name).write_bytes(text)
        refused(folder, f"{folder / name}: ", why)

    @pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
    def test_weight_map(self, folder, value):
        (folder / INDEX).write_text(json.dumps({"weight_map": value}))
        refused(folder, INDEX, "weight_map" if value != {"a": 1} else "a must be a string, is 1")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
        if value != "x":
            refused(folder, INDEX, "model.norm.weight must be a string", quoted(value))

    @pytest.mark.parametrize("value", ["x", 1.5, [1, "2"], {"a": 1}, True, [[1]], [None]])
    def test_end_tokens(self, folder, value):
        path = folder / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": value}))
        refused(folder, f"{path}: eos_token_id must be")

    def test_end_tokens_that_are_good_or_can_never_come(self, folder):
        path = folder / "generation_config.json"
        for value in (None, 7, [7, 8], 10**400, [-1, 10**400]):
            path.write_text(json.dumps({"eos_token_id": value}))
            assert 2 in converters.load(str(folder)).eos_token_ids

    @pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
    @pytest.mark.parametrize(
        "value", [None, 5, "x", [-1], [1.5], [[1]], 10**400, [10**400], [True]]
    )
    def test_entries_of_a_header(self, tmp_path, key, value):
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], key: value}
        text = json.dumps({"model.norm.weight": entry}).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        if (key, value) == ("dtype", "x"):
            with pytest.raises(ModelLoadError, match="dtype x; supported"):
                SafetensorsSource(tmp_path).tensor("model.norm.weight").read()
        else:
            refused(tmp_path, "x.safetensors", "model.norm.weight", key, load=open_tensors)

    def test_negative_sizes_whose_product_fits(self, tmp_path):
        text = json.dumps({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}})
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))
        refused(tmp_path, "shape [-1, -1] is impossible", load=open_tensors)

    @pytest.mark.parametrize(
        ("file", "key", "value", "why"),
        [
            ("jaxserve.json", "version", "1", "version must be an integer"),
            ("jaxserve.json", "quantization", 5, "quantization must be a string"),
            ("jaxserve.json", "quantization", [[]], "quantization must be a string"),
            ("params/final_norm.scale/.zarray", "dtype", "|O", "dtype '|O'"),
            ("params/final_norm.scale/.zarray", "dtype", "<f4,<f4", "dtype '<f4,<f4'"),
            ("params/final_norm.scale/.zarray", "dtype", [["a", "<f4"]], "dtype must be a string"),
            (
                "params/final_norm.scale/.zarray",
                "shape",
                ["64"],
                "shape must be a list of integers",
            ),
            ("params/final_norm.scale/.zarray", "chunks", None, "chunks must be a list"),
            ("params/final_norm.scale/.zarray", "order", {}, "order must be a string"),
        ],
    )
    def test_orbax_markers(self, made, file, key, value, why):
        path = made / "orbax" / file
        good = path.read_text()
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        try:
            refused(made / "orbax", str(path), why)
        finally:
            path.write_text(good)

    @pytest.mark.parametrize("value", ["awq", 5, ["x"], {"quant_method": {"a": 1}}])
    def test_quantization_config(self, folder, value):
        with pytest.raises((ModelLoadError, NotSupportedError), match="quantiz"):
            converters.load(str(folder), config_overrides={"quantization_config": value})

    @pytest.mark.parametrize(
        "path", ["x" * 5000, "a/" * 3000, "\0", "~nobody_of_that_name/x", "x\ud800", "x.gguf" * 50]
    )
    def test_model_paths_that_the_system_refuses(self, path):
        for load in (converters.load, converters.load_tokenizer):
            with pytest.raises(ModelLoadError) as caught:
                load(path)
            assert "model_path" in str(caught.value) and len(str(caught.value)) < 10_000

    def test_out_that_cannot_be_written(self, folder, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
            assert cli.main([str(folder), str(out)]) == 1
            assert "cannot be written" in capsys.readouterr().err
        with pytest.raises(InvalidRequestError, match="cannot be written"):
            converters.save(converters.load(str(folder)), tmp_path / "file" / "out")


def open_tensors(path: str) -> None:
    source = SafetensorsSource(Path(path))
    for name in source.names():
        source.tensor(name).read()


class TestStoredArray:
    """Every way to read a part of a file, against NumPy's own indexing."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    @pytest.mark.parametrize("shape", [(7,), (1000, 3), (130, 700), (3, 4, 5), (0, 4), ()])
    def test_reads_what_numpy_has(self, tmp_path, shape, dtype):
        values = np.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
        (tmp_path / "x").write_bytes(b"123" + values.tobytes())
        with files.open_inside(tmp_path, "x") as file:
            stored = StoredArray(file, 3, shape, np.dtype(dtype))
            np.testing.assert_array_equal(stored.read(), values)
            wide = np.zeros((*shape[::-1][:-1], 2 * (shape or (1,))[0]), np.float32)
            out = wide[..., : (shape or (1,))[0]].T if shape else np.zeros((), np.float32)
            stored.read_into(out)
            np.testing.assert_array_equal(out, values.astype(np.float32))
            if shape:
                part = np.empty_like(values[1:5])
                stored.read_into(part, 1)
                np.testing.assert_array_equal(part, values[1:5])
                blocks = [block.copy() for block in stored.blocks()]
                np.testing.assert_array_equal(np.concatenate([values[:0], *blocks]), values)

    def test_reads_beyond_two_gigabytes_go_on(self, tmp_path, monkeypatch):
        """One call of `preadv` may give less than was asked for."""
        preadv = os.preadv
        monkeypatch.setattr(
            "converters.files.os.preadv", lambda fd, out, at: preadv(fd, [out[0][:100]], at)
        )
        values = np.arange(1000, dtype=np.float32)
        (tmp_path / "x").write_bytes(values.tobytes())
        with files.open_inside(tmp_path, "x") as file:
            read = StoredArray(file, 0, (1000,), np.dtype(np.float32)).read()
        np.testing.assert_array_equal(read, values)


def test_nothing_stays_open_after_a_failure(folder):
    before = len(os.listdir("/proc/self/fd"))
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x")
    for _ in range(3):
        refused(folder, "model-00002")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_elements_of_json_are_counted_before_it_is_parsed():
    started = time.process_time()
    with pytest.raises(ModelLoadError, match=r"f: cannot be read as JSON: .* 8,000,001 elements"):
        json_files.parse(b"[" + b"0," * 8_000_000, "f")
    assert time.process_time() - started < 2
