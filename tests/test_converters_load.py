"""safetensors and dummy loading, format detection, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import converters
from converters.sources import SafetensorsSource
from jaxserve.errors import InvalidRequestError, ModelLoadError, NotSupportedError
from tests.checkpoints import (
    FAMILIES,
    IM_END,
    by_kv_head,
    make_checkpoint,
    make_config,
    make_weights,
    separate,
    write_weights,
)
from tests.marks import long

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(make_checkpoint(tmp_path / "model", tokenizer=False))


def equal(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def rewrite(folder: Path, **changes) -> None:
    """Rewrites the weights with tensors replaced, or dropped where the value is None."""
    tensors = make_weights(json.loads((folder / "config.json").read_text()))
    tensors |= changes
    write_weights(folder, {k: v for k, v in tensors.items() if v is not None})


class TestSafetensors:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_tensor_lands_in_its_place(self, family, tmp_path):
        path = make_checkpoint(tmp_path, family, tokenizer=False)
        config = json.loads((tmp_path / "config.json").read_text())
        weights = separate(config, make_weights(config))
        loaded = converters.load(path)
        assert loaded.format == "safetensors"
        assert list(loaded.params) == list(loaded.declaration.specs)
        for path_, spec in loaded.declaration.specs.items():
            assert (loaded.params[path_].shape, loaded.params[path_].dtype) == (
                spec.shape,
                spec.dtype,
            )
        layer = "model.layers.1."
        qkv = np.asarray(loaded.params["layers.1.attn.qkv.kernel"])
        names = [f"{layer}self_attn.{name}_proj.weight" for name in "qkv"]
        np.testing.assert_array_equal(qkv, by_kv_head(*(weights[n].T for n in names), kv_heads=2))
        if family in ("glm", "glm4", "qwen2"):
            bias = np.asarray(loaded.params["layers.1.attn.qkv.bias"])
            biases = [weights[name.replace("weight", "bias")] for name in names]
            np.testing.assert_array_equal(bias, by_kv_head(*biases, kv_heads=2))
        gate_up = np.asarray(loaded.params["layers.1.mlp.gate_up.kernel"])
        names = [f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up")]
        np.testing.assert_array_equal(gate_up, np.stack([weights[n].T for n in names], axis=1))
        down = np.asarray(loaded.params["layers.1.mlp.down.kernel"])
        np.testing.assert_array_equal(down, weights[f"{layer}mlp.down_proj.weight"].T)
        embedding = np.asarray(loaded.params["embed.embedding"])
        np.testing.assert_array_equal(embedding, weights["model.embed_tokens.weight"])

    def test_sharded_equals_single(self, folder, tmp_path):
        sharded = make_checkpoint(tmp_path / "sharded", shards=3, tokenizer=False)
        equal(converters.load(str(folder)).params, converters.load(sharded).params)

    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "half"])
    def test_dtypes(self, stored, dtype, tmp_path):
        path = make_checkpoint(tmp_path, dtype=stored, tokenizer=False)
        loaded = converters.load(path, dtype=dtype)
        target = np.dtype({"bfloat16": ml_dtypes.bfloat16, "half": "float16"}.get(dtype, dtype))
        config = json.loads((tmp_path / "config.json").read_text())
        raw = make_weights(config, dtype=stored)["model.layers.0.mlp.down_proj.weight"]
        down = np.asarray(loaded.params["layers.0.mlp.down.kernel"])
        assert down.dtype == target
        np.testing.assert_array_equal(down, raw.astype(target).T)

    def test_auto_dtype_on_cpu_is_float32(self, tmp_path):
        loaded = converters.load(make_checkpoint(tmp_path, dtype="bfloat16", tokenizer=False))
        assert {a.dtype for a in loaded.params.values()} == {np.dtype("float32")}
        assert loaded.config.dtype == "bfloat16"

    def test_known_extra_tensors_are_ignored(self, tmp_path):
        path = Path(make_checkpoint(tmp_path, tie_word_embeddings=True, tokenizer=False))
        extras = {
            "lm_head.weight": np.zeros((512, 64), np.float32),
            "model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        }
        rewrite(path, **extras)
        assert "lm_head.embedding" not in converters.load(str(path)).params

    def test_eos_is_the_union(self, folder):
        assert converters.load(str(folder)).eos_token_ids == (IM_END, 0)
        (folder / "generation_config.json").unlink()
        assert converters.load(str(folder)).eos_token_ids == (IM_END,)

    def test_config_overrides(self, folder):
        loaded = converters.load(
            str(folder), config_overrides={"max_position_embeddings": 99, "eos_token_id": [7]}
        )
        assert loaded.config.max_position_embeddings == 99
        assert loaded.eos_token_ids == (7, IM_END, 0)
        assert loaded.hf_config["max_position_embeddings"] == 99

    def test_parameters_outlive_the_file(self, folder):
        params = converters.load(str(folder)).params
        before = {path: np.array(array) for path, array in params.items()}
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        equal(before, {path: np.asarray(array) for path, array in params.items()})

    def test_fusing_on_an_accelerator_gives_the_same(self, folder, monkeypatch):
        """The path of GPUs, on the CPU's device: transposed and fused by XLA."""
        on_host = converters.load(str(folder), dtype="bfloat16").params
        monkeypatch.setattr("converters.convert.on_cpu", lambda sharding: False)
        equal(on_host, converters.load(str(folder), dtype="bfloat16").params)


class TestDummy:
    def test_needs_the_config_only(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(make_config("qwen3")))
        loaded = converters.load(str(tmp_path), load_format="dummy", dtype="bfloat16", seed=3)
        assert loaded.format == "dummy"
        for path, spec in loaded.declaration.specs.items():
            array = np.asarray(loaded.params[path], np.float32)
            assert (array.shape, loaded.params[path].dtype) == (spec.shape, spec.dtype)
            if path.endswith(".scale"):
                assert (array == 1).all()
            else:
                assert abs(array.std() - 0.02) < 2e-3
                assert abs(array.mean()) < 2e-3
        again = converters.load(str(tmp_path), load_format="dummy", dtype="bfloat16", seed=3)
        equal(loaded.params, again.params)
        other = converters.load(str(tmp_path), load_format="dummy", dtype="bfloat16", seed=4)
        kernels = [p for p in loaded.params if p.endswith("mlp.down.kernel")]
        assert not (np.asarray(other.params[kernels[0]]) == loaded.params[kernels[0]]).all()
        assert not (np.asarray(loaded.params[kernels[1]]) == loaded.params[kernels[0]]).all()

    def test_one_program_per_shape(self, tmp_path, monkeypatch):
        from converters import dummy

        made = []
        program = dummy._program
        monkeypatch.setattr(dummy, "_program", lambda *kind: made.append(kind[0]) or program(*kind))
        config = make_config(num_hidden_layers=6)
        (tmp_path / "config.json").write_text(json.dumps(config))
        converters.load(str(tmp_path), load_format="dummy")
        # embeddings, qkv, o, gate_up, down
        assert sorted(made) == [(64, 2, 128), (64, 64), (64, 128), (128, 64), (512, 64)]


class TestErrors:
    def test_everything_wrong_in_one_message(self, folder):
        rewrite(
            folder,
            **{
                "model.layers.0.self_attn.k_proj.weight": None,
                "model.norm.weight": None,
                "model.layers.0.mlp.extra.weight": np.zeros(3, np.float32),
                "model.layers.1.mlp.up_proj.weight": np.zeros((64, 128), np.float32),
                "lm_head.weight": np.zeros((511, 64), np.float32),
            },
        )
        with pytest.raises(ModelLoadError) as error:
            converters.load(str(folder))
        message = str(error.value)
        assert str(folder) in message
        for line in (
            "2 missing:\n    model.layers.0.self_attn.k_proj.weight\n    model.norm.weight",
            "1 unexpected:\n    model.layers.0.mlp.extra.weight",
            "2 wrongly shaped",
            "lm_head.weight is [511, 64], should be [512, 64]",
            "model.layers.1.mlp.up_proj.weight is [64, 128], should be [128, 64]",
        ):
            assert line in message

    def test_untied_head_missing(self, folder):
        rewrite(folder, **{"lm_head.weight": None})
        with pytest.raises(ModelLoadError, match=r"1 missing:\s+lm_head.weight"):
            converters.load(str(folder))

    @pytest.mark.parametrize("keep", [0, 5, 100, 4000, -1])
    def test_truncated_file(self, folder, keep):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            converters.load(str(folder))

    @pytest.mark.parametrize(
        "header",
        [
            b"not json at all",
            b'{"x": 3}',
            b"[1, 2]",
            b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}',
            b'{"x": {"shape": [1], "data_offsets": [0, 4]}}',
            b"\xff\xfe",
        ],
    )
    def test_corrupt_header(self, folder, header):
        data = struct.pack("<Q", len(header)) + header + bytes(8)
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelLoadError, match=r"model\.safetensors: damaged"):
            converters.load(str(folder))

    def test_header_length_of_garbage(self, folder):
        (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
        with pytest.raises(ModelLoadError, match=r"its header claims"):
            converters.load(str(folder))

    def test_damaged_bytes_never_raise_anything_else(self, folder):
        """Random changes in the header: a ModelLoadError, or a header that still makes sense."""
        file = folder / "model.safetensors"
        good = file.read_bytes()
        length = int.from_bytes(good[:8], "little")
        rng = np.random.default_rng(0)
        refused = 0
        for _ in range(300):
            data = bytearray(good)
            for position in rng.integers(0, 8 + length, rng.integers(1, 4)):
                data[position] = rng.integers(0, 256)
            file.write_bytes(data)
            try:
                source = SafetensorsSource(folder)
                for name in source.names():
                    assert source.tensor(name).read().shape == source.shape(name)
            except ModelLoadError as error:
                assert str(file) in str(error)
                refused += 1
        assert refused > 100

    def test_integer_weights(self, folder):
        rewrite(folder, **{"model.norm.weight": np.ones(64, np.int8)})
        with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has dtype I8; supported"):
            converters.load(str(folder))

    def test_shard_missing(self, tmp_path):
        path = make_checkpoint(tmp_path, shards=2, tokenizer=False)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelLoadError, match=r"index.*do not exist.*model-00002-of-00002"):
            converters.load(path)

    def test_index_damaged(self, tmp_path):
        path = make_checkpoint(tmp_path, shards=2, tokenizer=False)
        (tmp_path / "model.safetensors.index.json").write_text("{")
        with pytest.raises(ModelLoadError, match=r"index\.json: cannot be read as JSON"):
            converters.load(path)

    def test_tensor_twice(self, folder):
        shutil.copyfile(folder / "model.safetensors", folder / "a.safetensors")
        (folder / "model.safetensors").rename(folder / "b.safetensors")
        with pytest.raises(ModelLoadError, match=r"is in both .*a\.safetensors and .*b\.safe"):
            converters.load(str(folder))

    def test_missing_path(self, tmp_path):
        gone = tmp_path / "gone"
        with pytest.raises(ModelLoadError, match=f"looked for {gone}.*Give a folder with config"):
            converters.load(str(gone))
        with pytest.raises(ModelLoadError, match=r"no such file.*gone\.gguf"):
            converters.load("some/gone.gguf")

    def test_hub_id_without_a_hub(self, monkeypatch, tmp_path):
        def unreachable(*args, **kwargs):
            raise FileNotFoundError("no route to the hub\nsecond line")

        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        with pytest.raises(ModelLoadError) as error:
            converters.load("owner/model", revision="v1", download_dir=str(tmp_path))
        for part in (str(Path("owner/model").absolute()), "'v1'", "no route to the hub", "folder"):
            assert part in str(error.value)

    def test_hub_id_with_a_hub(self, monkeypatch, folder):
        asked = {}

        def snapshot(repo, **kwargs):
            asked.update(kwargs, repo=repo)
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        loaded = converters.load("owner/model", revision="v1", download_dir="/some/where")
        assert loaded.path == str(folder)
        assert (asked["repo"], asked["revision"]) == ("owner/model", "v1")
        assert asked["cache_dir"] == "/some/where"
        assert asked["allow_patterns"] == ["model.safetensors"]
        assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
        converters.load("owner/model", load_format="dummy")
        assert not any(name.endswith("safetensors") for name in asked["allow_patterns"])

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_are_never_read(self, folder, name):
        (folder / "model.safetensors").rename(folder / name)
        with pytest.raises(ModelLoadError, match=r"Pickles are never read.*save_pretrained"):
            converters.load(str(folder))
        with pytest.raises(ModelLoadError, match=r"is a pickle.*save_pretrained"):
            converters.load(str(folder / name))

    def test_empty_folder_and_wrong_file(self, tmp_path):
        with pytest.raises(ModelLoadError, match=r"looked for .*found nothing.*complete"):
            converters.load(str(tmp_path))
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"")
        with pytest.raises(ModelLoadError, match=r"give the folder that also holds its config"):
            converters.load(str(file))
        with pytest.raises(ModelLoadError, match=r"is a file, but not a .gguf file"):
            converters.load(__file__)

    def test_several_ggufs(self, tmp_path):
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelLoadError, match=r"Give one of the \.gguf files.*a\.gguf, b\.g"):
            converters.load(str(tmp_path))

    def test_config_missing_or_damaged(self, folder):
        (folder / "config.json").write_text("{ no")
        with pytest.raises(ModelLoadError, match=r"config\.json: cannot be read as JSON"):
            converters.load(str(folder))
        (folder / "config.json").write_text("[]")
        with pytest.raises(ModelLoadError, match=r"config\.json: should hold a JSON object"):
            converters.load(str(folder))
        (folder / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"config\.json does not exist"):
            converters.load(str(folder))

    def test_unsupported_architecture(self, folder):
        with pytest.raises(NotSupportedError, match=r"Falcon.*supported architectures: .*LlamaFor"):
            converters.load(str(folder), config_overrides={"architectures": ["FalconForCausalLM"]})

    def test_quantized(self, folder):
        with pytest.raises(NotSupportedError, match=r"quant_method='awq'"):
            converters.load(
                str(folder), config_overrides={"quantization_config": {"quant_method": "awq"}}
            )

    @pytest.mark.parametrize(
        ("name", "match"),
        [("pt", "exists in SGLang, but"), ("nonsense", "auto, safetensors, gguf, orbax, dummy")],
    )
    def test_bad_load_format(self, folder, name, match):
        with pytest.raises(NotSupportedError, match=f"load_format='{name}'.*{match}"):
            converters.load(str(folder), load_format=name)

    def test_load_format_that_does_not_fit(self, folder):
        with pytest.raises(ModelLoadError, match=r"looked for one \*\.gguf, found config"):
            converters.load(str(folder), load_format="gguf")
        with pytest.raises(ModelLoadError, match=r"looked for weights written by"):
            converters.load(str(folder), load_format="orbax")

    def test_bad_dtype(self, folder):
        with pytest.raises(InvalidRequestError, match=r"dtype must be one of auto.*'int4'"):
            converters.load(str(folder), dtype="int4")


MEMORY_PROGRAM = """
import sys, threading, time
import converters

def anonymous():
    with open("/proc/self/status") as file:
        return int(file.read().split("RssAnon:")[1].split()[0]) * 1024

converters.load(sys.argv[1])  # what the libraries allocate once
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
loaded = converters.load(sys.argv[2])
done = True
thread.join()
sizes = [array.nbytes for array in loaded.params.values()]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon of /proc")
@pytest.mark.parametrize("stored", [long("float32"), long("bfloat16")])
def test_peak_memory(stored, tmp_path):
    """At most the model in its target dtype plus twice its largest fused tensor."""
    small = make_checkpoint(tmp_path / "small", tokenizer=False)
    big = make_checkpoint(
        tmp_path / "big", dtype=stored, tokenizer=False, shards=2, vocab_size=8192,
        hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4,
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, small, big],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak, model, largest = map(int, run.stdout.split())
    print(f"peak {peak / 1e6:.1f} MB, model {model / 1e6:.1f} MB, largest {largest / 1e6:.1f} MB")
    assert model > 2e8
    assert peak <= model + 2 * largest
