"""ServerArgs: the four classes of options, ranges, aliases, command line."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from jaxserve.config import cache_folder
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.options import ALIASES, FOREIGN, OPTIONS, UPSTREAM, Options
from jaxserve.server_args import ServerArgs

FIELDS = {field.name: field.default for field in dataclasses.fields(Options)}
NO_OP, UNSUPPORTED = (
    {name: option.default for name, option in FOREIGN.items() if option.ignored == ignored}
    for ignored in (True, False)
)
ONLY_ONE = ("pp_size", "ep_size", "nnodes")
EXTRAS = {
    "grammar_timeout": 10.0,
    "mesh": None,
    "precompile": None,
    "wait_until_compiled": False,
    "compilation_cache_dir": None,
    "return_original_logprob": False,
    "max_top_logprobs": 32,
    "max_logprob_ids": 128,
    "logit_bias_capacity": 1024,
    "hidden_state_layers": None,
    "enable_return_logits": False,
    "max_state_bytes": 1 << 32,
    "allowed_local_media_path": None,
    "max_image_pixels": 89_478_485,
    "max_media_bytes": 1 << 34,
}


def parse(line: str) -> ServerArgs:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(line.split()))


def test_every_option_is_in_exactly_one_class():
    assert set(FIELDS) == set(OPTIONS)
    names = [*OPTIONS, *ALIASES, *NO_OP, *UNSUPPORTED]
    assert len(names) == len(set(names))
    implemented = {name for name in UPSTREAM if name not in FOREIGN}
    assert implemented == (set(OPTIONS) | set(ALIASES)) - set(EXTRAS)


def test_the_defaults_are_upstreams():
    upstream = {
        "tokenizer_path": None,
        "tokenizer_mode": "auto",
        "skip_tokenizer_init": False,
        "load_format": "auto",
        "dtype": "auto",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "context_length": None,
        "json_model_override_args": "{}",
        "weight_version": "default",
        "preferred_sampling_params": None,
        "mem_fraction_static": None,
        "max_total_tokens": None,
        "max_running_requests": None,
        "max_queued_requests": None,
        "chunked_prefill_size": None,
        "max_prefill_tokens": 16384,
        "schedule_policy": "fcfs",
        "schedule_conservativeness": 1.0,
        "radix_eviction_policy": "lru",
        "enable_priority_scheduling": False,
        "schedule_low_priority_values_first": False,
        "priority_scheduling_preemption_threshold": 10,
        "abort_on_priority_when_disabled": False,
        "default_priority_value": None,
        "page_size": None,
        "stream_interval": 1,
        "stream_output": False,
        "allow_auto_truncate": False,
        "random_seed": None,
        "log_level": "info",
        "log_requests": False,
        "log_requests_level": 2,
        "decode_log_interval": 40,
        "device": None,
        "attention_backend": None,
        "tp_size": 1,
        "dp_size": 1,
        "base_gpu_id": 0,
        "gpu_id_step": 1,
        "load_balance_method": "auto",
        "disable_radix_cache": False,
        "disable_overlap_schedule": False,
        "trust_remote_code": False,
    }
    assert {name: FIELDS[name] for name in upstream} == upstream
    assert {name: FIELDS[name] for name in EXTRAS} == EXTRAS


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "model_path"])
def test_the_defaults_pass_their_own_checks(name):
    assert getattr(ServerArgs("m", **{name: FIELDS[name]}), name) == FIELDS[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_path", 5),
        ("gpu_id_step", 0),
        ("base_gpu_id", -1),
        ("mesh", (2, 1)),
        ("load_balance_method", "random"),
        ("tokenizer_mode", "fast"),
        ("load_format", "pickle"),
        ("dtype", "int8"),
        ("quantization", "int4"),
        ("quantization", 8),
        ("kv_cache_dtype", "float16"),
        ("kv_cache_dtype", None),
        ("context_length", 1),
        ("context_length", "8k"),
        ("json_model_override_args", "{"),
        ("json_model_override_args", "[1]"),
        ("preferred_sampling_params", "nope"),
        ("preferred_sampling_params", {"temperature": -1.0}),
        ("mem_fraction_static", 0),
        ("mem_fraction_static", 1.0),
        ("mem_fraction_static", float("nan")),
        ("mem_fraction_static", "0.5"),
        ("max_total_tokens", 0),
        ("max_running_requests", 0),
        ("max_running_requests", 1.5),
        ("max_queued_requests", 0),
        ("chunked_prefill_size", 0),
        ("chunked_prefill_size", -2),
        ("max_prefill_tokens", 0),
        ("max_prefill_tokens", None),
        ("prefill_max_requests", 0),
        ("schedule_policy", "fifo"),
        ("schedule_conservativeness", -0.5),
        ("radix_eviction_policy", "mru"),
        ("priority_scheduling_preemption_threshold", -1),
        ("default_priority_value", 0.5),
        ("num_continuous_decode_steps", 0),
        ("num_continuous_decode_steps", 9),
        ("num_continuous_decode_steps", 2.5),
        ("page_size", 0),
        ("page_size", True),
        ("stream_interval", 0),
        ("random_seed", -1),
        ("log_level", "loud"),
        ("log_requests", 1),
        ("log_requests_level", 4),
        ("log_requests_level", -1),
        ("decode_log_interval", 0),
        ("device", "tpu"),
        ("attention_backend", "magic"),
        ("cuda_graph_bs", []),
        ("cuda_graph_bs", [0]),
        ("cuda_graph_bs", 8),
        ("cuda_graph_max_bs", 0),
        ("max_top_logprobs", -1),
        ("logit_bias_capacity", 0),
        ("disable_overlap_schedule", "no"),
        ("precompile", 1),
        *[(name, 0) for name in ONLY_ONE],
    ],
)
def test_bad_values_name_the_option(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        ServerArgs(**{"model_path": "m", name: value})
    message = str(caught.value)
    expected = "temperature" if isinstance(value, dict) else name
    assert expected in message
    if not isinstance(value, dict | str | list):
        assert str(value) in message


@pytest.mark.parametrize("name", ONLY_ONE)
def test_parallelism_is_not_supported_yet(name):
    with pytest.raises(NotSupportedError, match=f"{name}=2 is not supported yet"):
        ServerArgs("m", **{name: 2})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "w8a8_int8"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("speculative_algorithm", "EAGLE"),
        ("enable_lora", True),
        ("lora_paths", ["a"]),
        ("is_embedding", True),
        ("enable_memory_saver", True),
        ("schedule_policy", "lof"),
        ("radix_eviction_policy", "slru"),
        ("load_format", "sharded_state"),
    ],
)
def test_unsupported_options_say_so(name, value):
    with pytest.raises(NotSupportedError, match=rf"{name}.*not supported yet"):
        ServerArgs("m", **{name: value})


def test_priorities_go_with_first_come_first_served():
    with pytest.raises(InvalidRequestError, match=r"enable_priority_scheduling.*'lpm'"):
        ServerArgs("m", enable_priority_scheduling=True, schedule_policy="lpm")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_may_stay_at_upstreams_default(name):
    assert ServerArgs("m", **{name: UNSUPPORTED[name]}) == ServerArgs("m")
    assert ServerArgs("m", **{name: None}) == ServerArgs("m")


def test_cuda_only_options_cause_one_warning():
    with pytest.warns(UserWarning) as caught:
        args = ServerArgs(
            "m", disable_cuda_graph=True, sampling_backend="flashinfer", attention_backend="fa3"
        )
    assert len(caught) == 1
    for name in ("disable_cuda_graph", "sampling_backend", "attention_backend='fa3'"):
        assert name in str(caught[0].message)
    attention = OPTIONS["attention_backend"]
    assert [attention.effective(name) for name in ("fa3", "triton", None)] == [None, "triton", None]
    assert (args.sampling_backend, args.attention_backend) == ("flashinfer", "fa3")
    assert ServerArgs("m", **NO_OP) == ServerArgs("m")


def test_unknown_options_are_type_errors_with_near_matches():
    with pytest.raises(TypeError, match=r"'page_sise'.*'page_size'") as caught:
        ServerArgs("m", page_sise=16)
    assert isinstance(caught.value, UnknownOptionError)
    with pytest.raises(TypeError, match=r"tensor_parallel_size.*'tp_size'"):
        ServerArgs("m", tensor_parallel_size=1)
    with pytest.raises(TypeError, match="model_path is required"):
        ServerArgs()


@pytest.mark.parametrize(
    ("alias", "value"),
    [
        ("incremental_streaming_output", True),
        ("cuda_graph_bs_decode", (1, 2)),
        ("cuda_graph_max_bs_decode", 8),
    ],
)
def test_both_spellings_are_one_option(alias, value):
    name = ALIASES[alias]
    by_alias, by_name = ServerArgs("m", **{alias: value}), ServerArgs("m", **{name: value})
    assert by_alias == by_name and getattr(by_alias, name) == value
    for both in ({alias: value, name: value}, {name: FIELDS[name], alias: value}):
        assert ServerArgs("m", **both) == by_name
    assert ServerArgs("m", **{name: value, alias: FIELDS[name]}) == by_name
    if not isinstance(value, bool):
        other = (3,) if isinstance(value, tuple) else 9
        with pytest.raises(InvalidRequestError, match="the same option"):
            ServerArgs("m", **{name: other, alias: value})


def test_it_is_a_value_that_goes_round_through_asdict():
    args = ServerArgs("m", cuda_graph_bs=[1, 2], preferred_sampling_params='{"top_p": 0.5}')
    assert ServerArgs(**dataclasses.asdict(args)) == args
    assert dataclasses.replace(args, page_size=8).page_size == 8
    assert args.preferred_params == {"top_p": 0.5} and args.config_overrides == {}


def test_the_command_line():
    assert parse("--model-path m") == parse("--model m") == ServerArgs("m")
    args = parse(
        "--model m --tp 1 --page-size 16 --cuda-graph-bs 1 2 --mem-fraction-static 0.5"
        " --incremental-streaming-output --no-precompile --skip-tokenizer-init"
        " --quantization fp8 --kv-cache-dtype fp8_e4m3 --num-continuous-decode-steps 2"
    )
    assert args == ServerArgs(
        "m",
        page_size=16,
        cuda_graph_bs=[1, 2],
        mem_fraction_static=0.5,
        stream_output=True,
        precompile=False,
        skip_tokenizer_init=True,
        quantization="fp8",
        kv_cache_dtype="fp8_e4m3",
        num_continuous_decode_steps=2,
    )
    with pytest.warns(UserWarning, match="disable_cuda_graph"):
        assert parse("--model m --disable-cuda-graph").disable_cuda_graph
    with pytest.raises(NotSupportedError, match="quantization"):
        parse("--model m --quantization awq")


def test_a_namespace_with_other_flags_is_fine():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", default="x")
    ServerArgs.add_cli_args(parser)
    assert ServerArgs.from_cli_args(parser.parse_args(["--model", "m"])) == ServerArgs("m")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == str(tmp_path / "jaxserve" / "programs")
    assert (cache_folder(""), cache_folder("/x")) == ("", "/x")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == str(tmp_path / ".cache" / "jaxserve" / "programs")
