"""From constructor options to what the loader and the loop are given."""

from __future__ import annotations

import types

import jax
import pytest

import converters
from jaxserve.api.startup import start, tokenizer_eos
from jaxserve.errors import InvalidRequestError, ModelLoadError
from jaxserve.loop import EngineLoop
from jaxserve.parallel.mesh import mesh_of, replicated
from jaxserve.server_args import ServerArgs
from tests.api_fakes import byte_level_tokenizer

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
        eos_token_ids=(3, 4), format="dummy", declaration=declaration, config=CONFIG, hf_config={}
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
    sharding = options.pop("sharding")
    assert positional == ("model",) and options == {
        "load_format": "dummy",
        "dtype": "float16",
        "quantization": "fp8",
        "config_overrides": {"num_hidden_layers": 1},
        "revision": "r",
        "download_dir": "d",
        "seed": 5,
    }
    mesh = mesh_of(jax.devices("cpu")[0])
    assert sharding == replicated(mesh)
    assert calls["tokenizer"] == (
        ("tok",),
        {
            "tokenizer_mode": "auto",
            "revision": "r",
            "download_dir": "d",
            "chat_template": "{{ x }}",
        },
    )
    assert calls["loop"] == ((args, calls["loaded"], mesh), {})
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
    assert calls["load"][1]["sharding"] == replicated(mesh_of(jax.devices()[0]))
    assert tokenizer_eos(None) == frozenset()


def test_remote_code_never_runs(calls):
    with pytest.warns(UserWarning, match="trust_remote_code=True is ignored"):
        start(ServerArgs("model", trust_remote_code=True, compilation_cache_dir=""))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the device exists here")
def test_a_device_that_does_not_exist(calls):
    with pytest.raises(InvalidRequestError, match="device='cuda' is not available"):
        start(ServerArgs("model", device="cuda", compilation_cache_dir=""))
    assert "load" not in calls


def test_a_missing_model(tmp_path):
    with pytest.raises(ModelLoadError, match="nowhere"):
        start(ServerArgs(str(tmp_path / "nowhere"), compilation_cache_dir=""))
