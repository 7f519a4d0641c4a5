"""ServerArgs as clients of SGLang use it: every upstream name, assignment, copies, its methods."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import pickle
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxserve
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.options import FOREIGN, UPSTREAM
from jaxserve.server_args import ServerArgs
from tests.api_fakes import Fakes, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes(TOKENIZER, monkeypatch)
    yield fakes
    fakes.close()


def test_every_name_of_both_releases_is_a_field_that_can_be_read():
    args = ServerArgs("m")
    fields = {field.name for field in dataclasses.fields(ServerArgs)}
    assert len(UPSTREAM) > 500 and fields >= set(UPSTREAM)
    assert all(vars(args)[name] == option.default for name, option in FOREIGN.items())
    assert (args.host, args.port, args.node_rank, args.is_embedding) == (
        "127.0.0.1",
        30000,
        0,
        False,
    )
    assert (args.use_ray, args.cuda_graph_config, args.tokenizer_backend) == (
        False, None, "huggingface",
    )  # fmt: skip
    with pytest.raises(AttributeError):
        _ = args.page_sise


@pytest.mark.parametrize("name", UPSTREAM)
def test_at_the_default_of_either_release_nothing_happens(name):
    plain = ServerArgs("m")
    for value in UPSTREAM[name].defaults:
        args = ServerArgs("m", **{name: value})
        setattr(plain, name, value)
        assert getattr(args, name) == getattr(plain, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_ray", True), ("cuda_graph_config", {"a": 1}), ("host", "0.0.0.0"), ("grpc_port", 7)],
)
def test_what_has_no_meaning_here_warns_once_and_reads_as_given(name, value):
    with pytest.warns(UserWarning, match=f"no meaning in jaxserve: {name}$") as caught:
        args = ServerArgs("m", **{name: value})
    assert len(caught) == 1 and getattr(args, name) == value
    args = ServerArgs("m")
    with pytest.warns(UserWarning, match=name) as caught:
        setattr(args, name, value)
    assert len(caught) == 1 and getattr(args, name) == value


@pytest.mark.parametrize(("name", "value"), [("node_rank", 1), ("kv_canary", "log")])
def test_what_is_not_supported_is_refused_however_it_is_given(name, value):
    with pytest.raises(NotSupportedError, match=name):
        ServerArgs("m", **{name: value})
    args = ServerArgs("m")
    with pytest.raises(NotSupportedError, match=name):
        setattr(args, name, value)
    assert args == ServerArgs("m")


def test_assignment_checks_what_the_constructor_checks():
    args = ServerArgs("m")
    args.page_size, args.dtype = np.int64(16), torch.bfloat16
    assert (args.page_size, args.dtype, type(args.page_size)) == (16, "bfloat16", int)
    args.incremental_streaming_output = True
    assert args.stream_output is True
    args.stream_output = False
    assert args.incremental_streaming_output is False
    with pytest.raises(InvalidRequestError, match="page_size"):
        args.page_size = 0
    with pytest.raises(UnknownOptionError, match=r"'page_sise'.*'page_size'"):
        args.page_sise = 8
    args.schedule_policy = "lpm"
    args.enable_priority_scheduling = True
    with pytest.raises(InvalidRequestError, match="enable_priority_scheduling"):
        args.check_server_args()
    with pytest.raises(InvalidRequestError, match="enable_priority_scheduling"):
        jaxserve.Engine(server_args=args)


def test_an_engine_keeps_a_copy_that_cannot_be_changed(fakes):
    fakes.engine()  # from here on, engines are fakes
    args = ServerArgs("m", page_size=16)
    engine = jaxserve.Engine(server_args=args)
    fakes.engines.append(engine)
    args.page_size = 32
    assert engine.server_args.page_size == 16
    with pytest.raises(InvalidRequestError, match=r"page_size=8.*too late"):
        engine.server_args.page_size = 8
    with pytest.raises(InvalidRequestError, match="host"):
        del engine.server_args.host
    for free in (
        copy.copy(engine.server_args),
        copy.deepcopy(engine.server_args),
        pickle.loads(pickle.dumps(engine.server_args)),
        dataclasses.replace(engine.server_args),
    ):
        assert free == engine.server_args
        free.page_size = 8
    assert engine.server_args.page_size == 16
    assert engine.get_server_info()["host"] == "127.0.0.1"


def test_it_goes_round_as_a_dataclass_does():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = ServerArgs("m", stream_output=True, cuda_graph_bs=[1, 2], host="::1")
        rounds = [
            ServerArgs(**dataclasses.asdict(args)),
            ServerArgs(**vars(args)),
            copy.copy(args),
            copy.deepcopy(args),
            pickle.loads(pickle.dumps(args)),
            dataclasses.replace(args),
            eval(repr(args)),
        ]
        changed = dataclasses.replace(args, stream_output=False)
    assert all(each == args for each in rounds)
    assert set(dataclasses.asdict(args)) == {field.name for field in dataclasses.fields(args)}
    assert changed != args and changed.incremental_streaming_output is False
    assert args != "m"


def test_url():
    assert ServerArgs("m").url() == "http://127.0.0.1:30000"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ServerArgs("m", host="::1", port=80).url() == "http://[::1]:80"
        assert ServerArgs("m", ssl_certfile="c").url() == "https://127.0.0.1:30000"
        assert ServerArgs("m", host=10**5000).url().startswith("http://an integer of")


def test_the_command_line_knows_the_new_names():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = "--model m --use-ray --gc-threshold 1 2 --grpc-port 5 --ep 1 --pipeline-parallel-size 1"
    with pytest.warns(UserWarning, match="use_ray, gc_threshold, grpc_port"):
        args = ServerArgs.from_cli_args(parser.parse_args(given.split()))
    assert (args.use_ray, args.gc_threshold, args.grpc_port) == (True, [1, 2], 5)


@pytest.mark.parametrize(
    ("value", "wanted"), [("true", True), ("1", True), ("YES", True), ("0", False), ("", False)]
)
def test_original_logprobs_by_the_environment(monkeypatch, value, wanted):
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", value)
    assert ServerArgs("m").return_original_logprob is wanted
    for explicit in (True, False):
        assert ServerArgs("m", return_original_logprob=explicit).return_original_logprob is explicit
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = ServerArgs.from_cli_args(parser.parse_args(["--model", "m"]))
    assert args.return_original_logprob is wanted


def test_an_environment_that_says_neither(monkeypatch):
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "perhaps")
    with pytest.raises(InvalidRequestError, match=r"SGLANG_RETURN_ORIGINAL_LOGPROB.*'perhaps'"):
        ServerArgs("m")
    assert not ServerArgs("m", return_original_logprob=False).return_original_logprob


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        (np.float32, "float32"),
        (np.dtype("float16"), "float16"),
    ],
)
def test_dtypes_as_objects(given, name):
    assert ServerArgs("m", dtype=given).dtype == name


@pytest.mark.parametrize("given", [float, np.int8, torch.float64, 3, None])
def test_other_objects_are_no_dtypes(given):
    with pytest.raises(InvalidRequestError, match="dtype"):
        ServerArgs("m", dtype=given)


def test_types_that_clients_have():
    assert ServerArgs("m", kv_cache_dtype=torch.float8_e4m3fn).kv_cache_dtype == "fp8_e4m3"
    assert ServerArgs("m", log_level="DEBUG").log_level == "debug"
    assert ServerArgs("m", log_level="Warn").log_level == "warning"
    assert ServerArgs("m", log_requests=np.bool_(True)).log_requests is True
    assert ServerArgs("m", disable_radix_cache=np.array(True)).disable_radix_cache is True
    args = ServerArgs(Path("a") / "b", download_dir=Path("d"), tokenizer_path=Path("t"))
    assert (args.model_path, args.download_dir, args.tokenizer_path) == ("a/b", "d", "t")
    args = ServerArgs("m", page_size=torch.tensor(16), mem_fraction_static=jnp.float32(0.5))
    assert (args.page_size, args.mem_fraction_static) == (16, 0.5)
    assert ServerArgs("m", hicache_ratio=None).hicache_ratio == 2.0
    assert ServerArgs("m", use_ray=np.False_) == ServerArgs("m")


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("name", ["json_model_override_args", "preferred_sampling_params"])
@pytest.mark.parametrize(
    "value",
    [
        '{"a":' * 100_000,
        "{" + '"a": ' + "9" * 5000 + "}",
        "[1]",
        "\ud800",
        nested(100_000),
        {"a": object()},
        {"a": {None: 1}},
        {(1, 2): 3},
        7,
    ],
    ids=range(9),
)
def test_options_that_are_no_json_objects(name, value):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        ServerArgs("m", **{name: value})
    assert len(str(caught.value)) < 10_000


def test_overrides_are_copied():
    given = {"rope_scaling": {"factor": np.float32(2)}}
    args = ServerArgs("m", json_model_override_args=given)
    given["rope_scaling"]["factor"] = 3
    assert args.config_overrides == {"rope_scaling": {"factor": 2.0}}
    assert ServerArgs("m", preferred_sampling_params={"logit_bias": {5: 1}}).preferred_params


@pytest.mark.parametrize("name", ["context_length", "max_running_requests", "stream_interval"])
def test_sizes_beyond_the_devices_integers(name):
    for value in (2**31, 10**400, 10**5000):
        with pytest.raises(InvalidRequestError, match=rf"{name} must be in \[\d+, 2147483647\]"):
            ServerArgs("m", **{name: value})


@pytest.mark.parametrize("value", [10**400, 1e39, "x" * 10**7, [[]]])
def test_numbers_that_are_none(value):
    with pytest.raises(InvalidRequestError, match="mem_fraction_static") as caught:
        ServerArgs("m", mem_fraction_static=value)
    assert len(str(caught.value)) < 1000


def test_its_signature_names_every_option():
    """ms-swift asks it which options a release has."""
    names = inspect.signature(ServerArgs).parameters
    assert {"pp_size", "tokenizer_backend", "cuda_graph_bs", "precompile"} <= set(names)
    assert set(names) == {field.name for field in dataclasses.fields(ServerArgs)}
