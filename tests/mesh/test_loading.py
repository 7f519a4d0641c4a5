"""A checkpoint is read onto several devices in parts, and nobody holds the whole."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import converters
from benchmarks import checkpoints, loading
from converters.placement import Placement
from jaxserve.parallel.mesh import numbered_mesh
from jaxserve.weights import placement
from tests import gguf_files
from tests.checkpoints import make_checkpoint
from tests.cpu_devices import on_cpu_devices
from tests.marks import long

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "head_dim": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
ALLOWANCES = {4: 4, 8: 36}
"""MB by devices, for what libraries allocate: with 8 XLA compiles a program for this shape, in
which all of them exchange parts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The same sizes in each format; biases and a tied table are in some."""
    root = tmp_path_factory.mktemp("models")
    paths = {
        "safetensors": make_checkpoint(
            root / "hf", "qwen2", tokenizer=False, dtype="bfloat16", shards=2, **SIZES
        ),
        "tied": make_checkpoint(
            root / "tied", "llama", tokenizer=False, tie_word_embeddings=True, **SIZES
        ),
        "gguf": str(root / "model.gguf"),
        "orbax": str(root / "orbax"),
    }
    gguf_files.write_model(
        Path(paths["gguf"]), "llama", heads=8, mlp=96, vocab=512, tokenizer=None,
        quantization=gguf_files.GGMLQuantizationType.Q8_0,
    )  # fmt: skip
    converters.save(converters.load(paths["safetensors"]), paths["orbax"])
    return paths


def odd(path: str, mesh: Any) -> NamedSharding:
    """Cuts that pay no regard to heads, and one of both axes."""
    cuts = {
        "attn.qkv.kernel": (None, ("data", "tensor")),
        "attn.qkv.kernel_scale": ("tensor",),
        "attn.qkv.bias": ("tensor",),
        "mlp.gate_up.kernel": ("tensor", "data"),
        "mlp.gate_up.kernel_scale": ("data", "tensor"),
        "mlp.down.kernel": ("tensor", "data"),
        "embed.embedding": ("data", "tensor"),
        "lm_head.embedding": (None, "tensor"),
    }
    name = path.split(".", 2)[-1] if path.startswith("layers.") else path
    return NamedSharding(mesh, PartitionSpec(*cuts.get(name, ())))


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("kind", ["safetensors", "tied", "gguf", "orbax"])
def test_the_parts_are_those_of_the_whole(folders, monkeypatch, kind, on_cpu, quantization):
    """Onto the engine's cuts (with KV heads enough, and not) and others; read as for CPUs, and as
    for devices with memory of their own."""
    load = functools.partial(
        converters.load, folders[kind], dtype="bfloat16", quantization=quantization
    )
    whole = load()
    for module in ("convert", "orbax_format"):
        monkeypatch.setattr(f"converters.{module}.on_cpu", lambda sharding: on_cpu)
    mesh = numbered_mesh(jax.devices(), (2, 4), 0, 1)
    places: list[Placement] = [functools.partial(odd, mesh=mesh)]
    for tp in (2, 4):
        row = numbered_mesh(jax.devices(), (1, tp), 1, 1)
        places.append(placement(whole.config, row))
    for place in places:
        found = load(sharding=place).params
        assert list(found) == list(whole.params)
        for path, array in found.items():
            assert array.sharding == place(path), path
            assert array.dtype == whole.params[path].dtype
            assert np.asarray(array).tobytes() == np.asarray(whole.params[path]).tobytes(), path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon of /proc")
@pytest.mark.parametrize(("kind", "tp"), [long("safetensors", 4), ("safetensors", 8), ("orbax", 8)])
def test_memory_while_loading(kind, tp, tmp_path):
    """At most the weights plus the two largest tensors, of a model of 86 MB whose layers are many
    and small. With tp 8 each KV head is there twice."""
    model = "llama-40m"
    path = checkpoints.write(tmp_path / model, kind, loading.MODELS[model])
    options = ["--model", model, "--formats", kind, "--folder", str(path), "--tp", str(tp)]
    printed = on_cpu_devices(8, "-m", "benchmarks.loading", "--run", "load", *options)
    found = json.loads(printed.splitlines()[-1])
    assert found["weights_mb"] > 80 and found["largest_mb"] < 5
    assert found["excess_mb"] <= found["largest_mb"] + ALLOWANCES[tp], found
