"""Our Orbax folders: round trips bit for bit, restored onto shardings, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import converters
from converters import cli
from jaxserve.errors import InvalidRequestError, ModelLoadError
from tests.checkpoints import (
    CHAT_TEMPLATE,
    FAMILIES,
    LLAMA_LIKE,
    ONE_PLUS,
    make_checkpoint,
    make_weights,
)
from tests.cpu_devices import on_cpu_devices
from tests.marks import long_but

ROOT = Path(__file__).parent.parent


def equal(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An Orbax folder, made by the command line in a process of its own."""
    base = tmp_path_factory.mktemp("orbax")
    source = make_checkpoint(base / "hf", "llama", dtype="bfloat16")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "converters", source, str(base / "out")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "(safetensors) -> " in run.stdout
    assert "(orbax): 0.000 GB in" in run.stdout
    assert "WARNING" not in run.stderr
    return base / "out"


@pytest.mark.parametrize("family", long_but(FAMILIES, *LLAMA_LIKE, "gemma3", "olmo2"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(family, dtype, tmp_path):
    """Hugging Face -> ours -> Orbax -> ours -> Hugging Face, bit for bit; but for norms that are 1
    and more, of which that is kept which is used: the sum in float32."""
    path = make_checkpoint(tmp_path / "hf", family, dtype=dtype, attention_bias=family == "qwen3")
    first = converters.load(path, dtype=dtype)
    converters.save(first, tmp_path / "orbax")
    second = converters.load(str(tmp_path / "orbax"), dtype=dtype)
    assert second.format == "orbax"
    equal(first.params, second.params)
    assert (second.config, second.eos_token_ids) == (first.config, first.eos_token_ids)
    converters.save(second, tmp_path / "again", "safetensors")
    third = converters.load(str(tmp_path / "again"), dtype=dtype)
    equal(first.params, third.params)
    from safetensors.numpy import load_file

    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    originals = make_weights(config, dtype=dtype)
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == originals.keys()
    for name, tensor in originals.items():
        found = written[name]
        assert found.dtype == tensor.dtype
        if family in ONE_PLUS and "norm" in name:
            tensor, found = (1 + each.astype(np.float32) for each in (tensor, found))
        assert tensor.tobytes() == found.tobytes(), name


def test_cast_while_restoring(saved):
    half = converters.load(str(saved), dtype="bfloat16").params
    full = converters.load(str(saved)).params
    assert {a.dtype for a in full.values()} == {np.dtype("float32")}
    equal({p: a.astype("float32") for p, a in half.items()}, full)


def test_stock_orbax_reads_it(saved):
    import orbax.checkpoint as ocp

    params = converters.load(str(saved), dtype="bfloat16").params
    with ocp.PyTreeCheckpointer() as checkpointer:
        stock = checkpointer.restore(saved / "params")
    equal(params, {path: stock[path] for path in params})
    assert stock.keys() == params.keys()


def test_chunks_are_raw(saved):
    params = converters.load(str(saved), dtype="bfloat16").params
    name = "layers.0.attn.qkv.kernel"
    chunk = saved / "params" / name / "0.0"
    assert chunk.read_bytes() == np.asarray(params[name]).tobytes()


def test_everything_else_of_the_folder(saved):
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert (saved / "generation_config.json").exists()
    tokenizer = converters.load_tokenizer(str(saved))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.decode(tokenizer.encode("Paris, 日本語")) == "Paris, 日本語"


SHARDED_PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import converters

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
whole = converters.load(sys.argv[1]).params

def placement(path):
    if path.endswith("gate_up.kernel"):
        return NamedSharding(mesh, P(None, None, "tensor"))
    if path.endswith("qkv.kernel"):
        return NamedSharding(mesh, P(None, "tensor"))
    if path.endswith((".kernel", ".embedding")):
        return NamedSharding(mesh, P("tensor"))
    return NamedSharding(mesh, P())

replicated = NamedSharding(mesh, P())
for path in sys.argv[1:]:
    for sharding in (placement, replicated):
        params = converters.load(path, sharding=sharding).params
        for name, array in params.items():
            expected = sharding if sharding is replicated else placement(name)
            assert array.sharding == expected, name
            np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[name]))
dummy = converters.load(sys.argv[1], sharding=placement, load_format="dummy").params
assert dummy["embed.embedding"].sharding == placement("embed.embedding")
assert dummy["final_norm.scale"].sharding == replicated
print(params["embed.embedding"].shape, "done")
"""


def test_restored_onto_a_sharding(saved):
    paths = [str(saved), str(saved.parent / "hf")]
    printed = on_cpu_devices(8, "-W", "error", "-c", SHARDED_PROGRAM, *paths)
    assert "done" in printed


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        path = make_checkpoint(tmp_path / "hf", tokenizer=False, num_hidden_layers=1)
        converters.save(converters.load(path), tmp_path / "orbax")
        return tmp_path / "orbax"

    def load_error(self, folder: Path) -> str:
        with pytest.raises(ModelLoadError) as error:
            converters.load(str(folder))
        return str(error.value)

    def test_chunk_truncated(self, folder):
        chunk = folder / "params" / "embed.embedding" / "0.0"
        os.truncate(chunk, 1000)
        message = self.load_error(folder)
        assert f"{chunk}: damaged: 1000 bytes long, should be 131072" in message

    def test_chunk_missing(self, folder):
        chunk = folder / "params" / "final_norm.scale" / "0"
        chunk.unlink()
        assert f"{chunk}: no such file" in self.load_error(folder)

    def test_header_damaged(self, folder):
        header = folder / "params" / "final_norm.scale" / ".zarray"
        good = json.loads(header.read_text())
        header.write_text("{")
        assert f"{header}: cannot be read as JSON" in self.load_error(folder)
        header.write_text(json.dumps(good | {"compressor": {"id": "zstd"}}))
        assert f"{header}: should be one uncompressed chunk" in self.load_error(folder)

    def test_parameters_of_another_config(self, folder):
        (folder / "params" / "final_norm.scale").rename(folder / "params" / "other")
        config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
        (folder / "config.json").write_text(json.dumps(config))
        message = self.load_error(folder)
        assert "missing final_norm.scale" in message
        assert "unexpected other" in message
        assert "layers.0.mlp.down.kernel is [128, 64], should be [96, 64]" in message

    def test_marker(self, folder):
        marker = folder / "jaxserve.json"
        for version in (1, 99):  # 1: fused parameters in another order
            marker.write_text(json.dumps({"version": version, "dtype": "bfloat16"}))
            message = self.load_error(folder)
            assert f"format version {version}, this jaxserve reads 2" in message
            assert "convert the checkpoint that it was made of again" in message
        marker.write_text("")
        assert "jaxserve.json: cannot be read as JSON" in self.load_error(folder)
        marker.unlink()
        assert "looked for" in self.load_error(folder)


class TestCommandLine:
    def test_formats_and_dtype(self, saved, tmp_path, capsys):
        out = tmp_path / "out"
        arguments = [str(saved), str(out), "--format", "safetensors", "--dtype", "float32"]
        assert cli.main(arguments) == 0
        assert f"{saved} (orbax) -> {out} (safetensors)" in capsys.readouterr().out
        loaded = converters.load(str(out))
        assert (loaded.format, loaded.config.dtype) == ("safetensors", "float32")
        equal(loaded.params, converters.load(str(saved)).params)

    def test_refuses_to_overwrite(self, saved, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        assert cli.main([str(saved), str(tmp_path)]) == 1
        assert f"error: {tmp_path} exists and is not an empty" in capsys.readouterr().err
        assert cli.main([str(saved), str(tmp_path / "file")]) == 1
        assert (tmp_path / "file").read_text() == "mine"

    def test_errors(self, saved, tmp_path, capsys):
        out = str(tmp_path / "out")
        assert cli.main([str(tmp_path / "gone"), out]) == 1
        assert "error: model_path=" in capsys.readouterr().err
        assert cli.main([str(saved), out, "--load-format", "pt"]) == 1
        assert "error: load_format='pt'" in capsys.readouterr().err
        assert cli.main([str(saved), out, "--dtype", "int4"]) == 1
        assert "error: dtype must be one of" in capsys.readouterr().err
        with pytest.raises(SystemExit, match=r"2"):
            cli.main([str(saved), out, "--format", "pickle"])
        assert not Path(out).exists()

    def test_save_format(self, saved, tmp_path):
        with pytest.raises(InvalidRequestError, match=r"save_format must be one of.*'pickle'"):
            converters.save(converters.load(str(saved)), tmp_path / "out", "pickle")


class TestTokenizer:
    def test_without_torch_and_without_a_word(self, saved):
        program = (
            "import sys; sys.modules['torch'] = None\n"
            "import converters\n"
            f"tokenizer = converters.load_tokenizer({str(saved)!r})\n"
            f"converters.load({str(saved)!r})\n"
            "messages = [{'role': 'user', 'content': 'hi'}]\n"
            "print(tokenizer.apply_chat_template(messages, tokenize=False))"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS")}
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            cwd=ROOT, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout == "<|im_start|>user\nhi<|im_end|>\n\n"

    def test_chat_template_given(self, saved, tmp_path):
        text = "{{ messages[0]['content'] }}!"
        file = tmp_path / "template.jinja"
        file.write_text(text)
        for given in (text, str(file)):
            tokenizer = converters.load_tokenizer(str(saved), chat_template=given)
            messages = [{"role": "user", "content": "hi"}]
            assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi!"
        with pytest.raises(InvalidRequestError, match=r"chat_template='nowhere'"):
            converters.load_tokenizer(str(saved), chat_template="nowhere")

    def test_errors(self, saved, tmp_path):
        with pytest.raises(InvalidRequestError, match=r"tokenizer_mode must be one of.*'fast'"):
            converters.load_tokenizer(str(saved), tokenizer_mode="fast")
        with pytest.raises(ModelLoadError, match=r"no usable tokenizer .*skip_tokenizer_init"):
            converters.load_tokenizer(str(tmp_path))
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ModelLoadError, match=r"no usable tokenizer"):
            converters.load_tokenizer(str(tmp_path))
        with pytest.raises(ModelLoadError, match=r"looked for"):
            converters.load_tokenizer(str(tmp_path / "gone"))
