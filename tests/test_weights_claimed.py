"""Weights that are no numbers, and sizes that no tensor confirms: refused while loading, without
taking much time or memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import converters
import jaxserve
from converters import finite, orbax_format
from converters.cli import main as convert
from jaxserve.errors import ModelLoadError
from jaxserve.models.config import MOST_LAYERS
from tests import gguf_files
from tests.checkpoints import make_checkpoint, make_config, make_weights, write_weights

ROOT = Path(__file__).parent.parent
NAMES = (
    "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.input_layernorm.weight", "lm_head.weight",
)  # fmt: skip


def spoiled(folder: Path, name: str, value: float, dtype: str = "float32") -> str:
    """A checkpoint whose tensor `name` has `value` as its last element."""
    path = make_checkpoint(folder, tokenizer=False, dtype=dtype)
    tensors = make_weights(make_config(dtype=dtype), dtype=dtype)
    tensors[name].reshape(-1)[-1] = value
    write_weights(path, tensors)
    return path


class TestNumbers:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("name", NAMES)
    def test_the_tensor_is_named(self, name, value, tmp_path):
        """NaN or infinity anywhere in a safetensors file."""
        path = spoiled(tmp_path, name, value)
        with pytest.raises(ModelLoadError, match=f"{path}: tensor {name} holds infinity or NaN"):
            converters.load(path)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("stored", ["bfloat16", "float16"])
    def test_of_sixteen_bits(self, stored, dtype, tmp_path):
        path = spoiled(tmp_path, NAMES[1], np.nan, stored)
        with pytest.raises(ModelLoadError, match=f"tensor {NAMES[1]} holds"):
            converters.load(path, dtype=dtype)

    def test_numbers_too_large_for_the_dtype_they_are_used_in(self, tmp_path):
        path = spoiled(tmp_path, NAMES[1], 1e30)
        converters.load(path)  # finite, although its square is not
        with pytest.raises(ModelLoadError, match=r"holds infinity or NaN \(as float16\)"):
            converters.load(path, dtype="float16")

    def test_on_an_accelerator(self, tmp_path, monkeypatch):
        """The path of GPUs, on the CPU's device."""
        path = spoiled(tmp_path, NAMES[1], np.nan)
        monkeypatch.setattr("converters.convert.on_cpu", lambda sharding: False)
        with pytest.raises(ModelLoadError, match=f"tensor {NAMES[1]} holds"):
            converters.load(path)

    @pytest.mark.parametrize("scheme", ["fp8", "w8a16_int8"])
    def test_of_quantized_kernels(self, scheme, tmp_path):
        path = spoiled(tmp_path, NAMES[1], np.inf)
        with pytest.raises(ModelLoadError, match="infinity or NaN"):
            converters.load(path, quantization=scheme)

    def test_of_a_gguf_file(self, tmp_path):
        path = tmp_path / "tiny.gguf"
        gguf_files.write_model(path)
        data = bytearray(path.read_bytes())
        data[-4:] = np.float32(np.nan).tobytes()  # the last number of lm_head
        path.write_bytes(data)
        with pytest.raises(ModelLoadError, match=r"tiny\.gguf: tensor lm_head\.weight holds"):
            converters.load(str(path))

    def test_the_converter_neither_reads_nor_writes_them(self, tmp_path, capsys):
        path = spoiled(tmp_path / "in", NAMES[0], np.nan)
        assert convert([path, str(tmp_path / "out")]) == 1
        assert f"tensor {NAMES[0]} holds" in capsys.readouterr().err
        params = {"embed.embedding": jnp.full((3, 4), np.nan)}
        with pytest.raises(ModelLoadError, match=r"tensor embed\.embedding holds"):
            orbax_format.save(tmp_path / "orbax", params, "float32")

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
    def test_every_position_of_every_dtype(self, dtype):
        rng = np.random.default_rng(0)
        check = finite.checking("x")
        for shape in ((), (5,), (700, 400)):
            tensor = rng.standard_normal(shape).astype(dtype)
            check(np.asarray(tensor))
            for value in (np.nan, np.inf, -np.inf):
                bad = np.array(tensor)
                bad.reshape(-1)[rng.integers(bad.size)] = value
                with pytest.raises(ModelLoadError, match="tensor x holds"):
                    check(bad)


SIZE_PROGRAM = """
import json, resource, sys, time
import jax, converters
from jaxserve.errors import ModelLoadError
jax.devices()
path, key = sys.argv[1:]
for value in json.loads(sys.stdin.read()):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        converters.load(path, config_overrides={key: value})
        sys.exit(f"{key}={value} was loaded")
    except ModelLoadError as error:
        assert f"{key}" in str(error) and str(value) in str(error), error
        assert len(str(error)) < 10_000
    spent = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert spent < 5 and grown < 100_000, (value, spent, grown)
"""


class TestSizes:
    @pytest.mark.parametrize(
        ("key", "values"),
        [
            ("num_hidden_layers", [1, 3, MOST_LAYERS, 20_000, 10**9]),
            ("vocab_size", [511, 10**9]),
            ("intermediate_size", [96, 10**9]),
        ],
    )
    def test_are_compared_with_the_tensors(self, key, values, tmp_path):
        """json_model_override_args, and so config.json, alike."""
        path = make_checkpoint(tmp_path, tokenizer=False)
        done = subprocess.run(
            [sys.executable, "-c", SIZE_PROGRAM, path, key], input=json.dumps(values), text=True,
            capture_output=True, cwd=ROOT, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_key_value_heads"])
    def test_heads_and_width(self, key, tmp_path):
        path = make_checkpoint(tmp_path, tokenizer=False)
        with pytest.raises(ModelLoadError, match=f"{key}=256"):
            converters.load(path, config_overrides={key: 256, "num_attention_heads": 256,
                                                    "head_dim": 16} | {key: 256})  # fmt: skip

    @pytest.mark.parametrize("count", [1, 3, 20_000, 2**32 - 1])
    def test_of_a_gguf_file(self, count, tmp_path):
        path = tmp_path / "tiny.gguf"
        gguf_files.write_model(path, metadata={"{arch}.block_count": count})
        with pytest.raises(ModelLoadError, match=f"llama.block_count={count}, .* 2 layers"):
            converters.load(str(path))
        gguf_files.write_model(path)
        with pytest.raises(ModelLoadError, match=f"num_hidden_layers.*{count}"):
            converters.load(str(path), config_overrides={"num_hidden_layers": count})

    def test_of_an_orbax_folder(self, tmp_path):
        path = make_checkpoint(tmp_path / "in")
        assert convert([path, str(tmp_path / "out")]) == 0
        for count in (1, 3, 20_000):
            with pytest.raises(ModelLoadError, match=f"num_hidden_layers.*{count}"):
                converters.load(
                    str(tmp_path / "out"), config_overrides={"num_hidden_layers": count}
                )

    @pytest.mark.parametrize(
        "sizes",
        [
            {"num_hidden_layers": 1000, "intermediate_size": 10**7},
            {"vocab_size": 2**31 - 1},
            {"hidden_size": 10**8, "head_dim": 16},
            {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 16},
        ],
    )
    def test_dummy_weights_must_have_room(self, sizes, tmp_path):
        """No tensor confirms them: their bytes are compared with the memory that is free."""
        (tmp_path / "config.json").write_text(json.dumps(make_config(**sizes)))
        key, value = next(iter(sizes.items()))
        with pytest.raises(ModelLoadError, match=rf"{key}={value}.* GB of parameters; .* GB are"):
            jaxserve.Engine(
                model_path=str(tmp_path), load_format="dummy", skip_tokenizer_init=True,
                device="cpu",
            )  # fmt: skip
