"""From constructor options to what the loader and the loop are given."""

from __future__ import annotations

import copy
import types

import jax
import numpy as np
import pytest

import converters
from jaxserve.api.info import server_info
from jaxserve.api.startup import start, tokenizer_eos
from jaxserve.errors import InvalidRequestError, ModelLoadError
from jaxserve.loop import EngineLoop
from jaxserve.models.registry import config_from_hf
from jaxserve.parallel.mesh import given_mesh, mesh_of, numbered_mesh, replicas, replicated
from jaxserve.server_args import ServerArgs
from tests.api_fakes import byte_level_tokenizer
from tests.checkpoints import make_config

TOKENIZER = byte_level_tokenizer()
CONFIG = types.SimpleNamespace(
    vocab_size=320, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
LOOP = types.SimpleNamespace(limits=types.SimpleNamespace(context_length=512))


@pytest.fixture
def calls(monkeypatch):
    """Records the calls to the loader; nothing is loaded."""
    made = {}

    def record(name, result):
        def call(*args, **kwargs):
            made[name] = (args, kwargs)
            return result

        return call

    declaration = types.SimpleNamespace(quantization="fp8", dtype="float16")
    loaded = types.SimpleNamespace(
        eos_token_ids=(3, 4),
        format="dummy",
        declaration=declaration,
        config=CONFIG,
        hf_config={},
        processor_config=None,
        tower=None,
    )
    monkeypatch.setattr(converters, "load", record("load", loaded))
    monkeypatch.setattr(converters, "load_tokenizer", record("tokenizer", TOKENIZER))
    monkeypatch.setattr(EngineLoop, "start", record("loop", LOOP))
    made["loaded"] = loaded
    return made


def test_options_reach_the_loader(calls):
    args = ServerArgs(
        "model",
        tokenizer_path="tok",
        dtype="half",
        quantization="fp8",
        load_format="dummy",
        json_model_override_args='{"num_hidden_layers": 1}',
        revision="r",
        download_dir="d",
        random_seed=5,
        chat_template="{{ x }}",
        compilation_cache_dir="",
        device="cpu",
    )
    started = start(args)
    positional, options = calls["load"]
    placement = options.pop("placing")(config_from_hf(make_config("llama")))
    assert positional == ("model",) and options == {
        "load_format": "dummy",
        "dtype": "float16",
        "quantization": "fp8",
        "config_overrides": {"num_hidden_layers": 1},
        "revision": "r",
        "towers": True,
        "context_length": None,
        "download_dir": "d",
        "seed": 5,
    }
    mesh = mesh_of(jax.devices("cpu")[0])
    assert placement("lm_head.embedding") == replicated(mesh)
    assert calls["tokenizer"] == (
        ("tok",),
        {
            "tokenizer_mode": "auto",
            "revision": "r",
            "download_dir": "d",
            "chat_template": "{{ x }}",
        },
    )
    assert calls["loop"] == ((args, calls["loaded"], mesh, None), {})
    assert (started.loop, started.tokenizer, started.load_format, started.quantization) == (
        LOOP,
        TOKENIZER,
        "dummy",
        "fp8",
    )
    assert started.eos_ids == {3, 4, TOKENIZER.eos_token_id}


def test_defaults_take_the_first_device_and_leave_the_dtype_to_the_loader(calls):
    started = start(ServerArgs("model", skip_tokenizer_init=True, compilation_cache_dir=""))
    assert started.tokenizer is None and started.eos_ids == {3, 4} and "tokenizer" not in calls
    assert calls["load"][1]["dtype"] == "auto"
    placement = calls["load"][1]["placing"](config_from_hf(make_config("llama")))
    assert placement("lm_head.embedding") == replicated(mesh_of(jax.devices()[0]))
    assert tokenizer_eos(None) == frozenset()


def test_remote_code_never_runs(calls):
    with pytest.warns(UserWarning, match="trust_remote_code=True is ignored"):
        start(ServerArgs("model", trust_remote_code=True, compilation_cache_dir=""))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the device exists here")
def test_a_device_that_does_not_exist(calls):
    with pytest.raises(InvalidRequestError, match="device='cuda' is not available"):
        start(ServerArgs("model", device="cuda", compilation_cache_dir=""))
    assert "load" not in calls


MESHES = {
    "axes": (("data", "model"), (1, 1), r"mesh must have the axes \('data', 'tensor'\).*'model'"),
    "order": (("tensor", "data"), (1, 1), "in this order"),
    "one axis": (("data",), (1,), r"axes \('data',\) of sizes \(1,\)"),
}


@pytest.mark.parametrize("case", MESHES)
def test_a_mesh_with_other_axes(calls, case):
    axes, shape, message = MESHES[case]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(shape), axes)
    with pytest.raises(InvalidRequestError, match=message):
        ServerArgs("model", mesh=mesh)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tp_size", 2), ("dp_size", 2), ("base_gpu_id", 1), ("gpu_id_step", 2), ("device", "cpu")],
)
def test_a_mesh_beside_what_it_says(name, value):
    mesh = mesh_of(jax.devices()[0])
    with pytest.raises(InvalidRequestError, match=f"{name}={value!r} contradicts"):
        ServerArgs("model", mesh=mesh, **{name: value})


def test_a_mesh_is_where_an_engine_runs(calls):
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
    args = ServerArgs("model", mesh=mesh, skip_tokenizer_init=True, compilation_cache_dir="")
    start(args)
    assert calls["loop"][0][2] == mesh_of(jax.devices()[0])
    assert args == copy.copy(args) and "Mesh" in repr(args)
    assert server_info_of(args)["mesh"] == str(mesh)


def server_info_of(args):
    limits = types.SimpleNamespace(longest=4)
    return server_info(args, limits, {"max_total_num_tokens": 4})


def test_devices_that_are_not_there(calls):
    there = len(jax.devices())
    with pytest.raises(InvalidRequestError) as caught:
        start(ServerArgs("model", base_gpu_id=there, compilation_cache_dir=""))
    for part in (f"base_gpu_id={there}", f"JAX has {there}", "XLA_FLAGS"):
        assert part in str(caught.value)
    assert "load" not in calls


class Device(types.SimpleNamespace):
    """A jax.Device of no platform."""

    def __hash__(self):
        return self.id


DEVICES = [Device(id=n, platform="gpu", device_kind="X", process_index=0) for n in range(8)]


@pytest.mark.parametrize(
    ("shape", "base", "step", "ids"),
    [
        ((1, 1), 3, 1, [[3]]),
        ((2, 2), 0, 1, [[0, 1], [2, 3]]),
        ((2, 2), 1, 2, [[1, 3], [5, 7]]),
        ((1, 8), 0, 1, [[*range(8)]]),
        ((4, 1), 0, 2, [[0], [2], [4], [6]]),
    ],
)
def test_numbers_of_devices(shape, base, step, ids):
    mesh = numbered_mesh(DEVICES, shape, base, step)
    assert mesh.axis_names == ("data", "tensor") and mesh.devices.shape == shape
    assert [[device.id for device in row] for row in mesh.devices] == ids
    rows = replicas(mesh)
    assert [row.devices.shape for row in rows] == [(1, shape[1])] * shape[0]
    assert [[device.id for device in row.devices.flat] for row in rows] == ids


@pytest.mark.parametrize(
    ("shape", "base", "step", "numbers"),
    [
        ((3, 3), 0, 1, ["dp_size=3 x tp_size=3", "number 8", "8 gpu devices"]),
        ((2, 2), 2, 2, ["base_gpu_id=2", "gpu_id_step=2", "number 8", "0 to 7"]),
    ],
)
def test_more_devices_than_there_are(shape, base, step, numbers):
    with pytest.raises(InvalidRequestError) as caught:
        numbered_mesh(DEVICES, shape, base, step)
    for number in numbers:
        assert number in str(caught.value)
    assert "XLA_FLAGS" not in str(caught.value)


BAD_MESHES = {
    "twice": ([DEVICES[0], DEVICES[0]], "more than once"),
    "kinds": ([DEVICES[0], Device(**{**vars(DEVICES[1]), "device_kind": "Y"})], "gpu X, gpu Y"),
    "processes": ([DEVICES[0], Device(**{**vars(DEVICES[1]), "process_index": 1})], "processes"),
}


@pytest.mark.parametrize("case", BAD_MESHES)
def test_meshes_that_no_engine_can_run_on(case):
    devices, message = BAD_MESHES[case]
    mesh = jax.sharding.Mesh(np.array([devices]), ("data", "tensor"))
    with pytest.raises(InvalidRequestError, match=message):
        given_mesh(mesh)


def test_a_missing_model(tmp_path):
    with pytest.raises(ModelLoadError, match="nowhere"):
        start(ServerArgs(str(tmp_path / "nowhere"), compilation_cache_dir=""))
