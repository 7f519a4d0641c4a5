"""The engine's constructor options as one object, SGLang's `ServerArgs`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

from jaxserve.api import checks
from jaxserve.api.foreign_options import NO_OP, UNSUPPORTED
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError
from jaxserve.options import ALIASES, FOREIGN_ATTENTION, HINTS, ONLY_ONE, OPTIONS
from jaxserve.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, init=False)
class ServerArgs:
    """Options of `Engine(**kwargs)`; None means "decided by the engine". Meanings: docs/api.md.

    The fields are the implemented options. SGLang's other options are accepted too: CUDA-only ones
    cause one warning for all of them, ones that jaxserve does not support raise NotSupportedError,
    unknown ones UnknownOptionError (a TypeError). Values out of range raise InvalidRequestError.
    """

    model_path: str
    tokenizer_path: str | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    context_length: int | None = None
    revision: str | None = None
    download_dir: str | None = None
    json_model_override_args: str | Mapping[str, Any] = "{}"
    trust_remote_code: bool = False
    served_model_name: str | None = None
    chat_template: str | None = None
    weight_version: str = "default"
    preferred_sampling_params: str | Mapping[str, Any] | None = None
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    chunked_prefill_size: int | None = None
    enable_mixed_chunk: bool | None = None
    max_prefill_tokens: int = 16384
    prefill_max_requests: int | None = None
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = 1.0
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10
    default_priority_value: int | None = None
    abort_on_priority_when_disabled: bool = False
    num_continuous_decode_steps: int | None = None
    enable_deterministic_inference: bool = False
    page_size: int | None = None
    disable_radix_cache: bool = False
    radix_eviction_policy: str = "lru"
    enable_hierarchical_cache: bool = False
    hicache_ratio: float = 2.0
    hicache_size: int = 0
    disable_overlap_schedule: bool = False
    allow_auto_truncate: bool = False
    random_seed: int | None = None
    stream_interval: int = 1
    stream_output: bool = False
    enable_metrics: bool = False
    log_level: str = "info"
    log_requests: bool = False
    log_requests_level: int = 2
    decode_log_interval: int = 40
    device: str | None = None
    attention_backend: str | None = None
    cuda_graph_bs: tuple[int, ...] | None = None
    cuda_graph_max_bs: int | None = None
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    nnodes: int = 1
    precompile: bool | None = None
    compilation_cache_dir: str | None = None
    return_original_logprob: bool = False
    max_top_logprobs: int = 32
    max_logprob_ids: int = 128
    logit_bias_capacity: int = 1024

    def __init__(self, model_path: str | None = None, **options: Any) -> None:
        if model_path is None:
            raise UnknownOptionError("model_path is required")
        values = _sorted_out({"model_path": model_path, **options})
        for field in dataclasses.fields(self):
            value = values.get(field.name, field.default)
            object.__setattr__(self, field.name, OPTIONS[field.name].check(field.name, value))
        for name in ONLY_ONE:
            if getattr(self, name) > 1:
                raise NotSupportedError(f"{name}={getattr(self, name)} is not supported yet")
        if self.chunked_prefill_size == 0:
            raise InvalidRequestError("chunked_prefill_size must be -1 or at least 1, got 0")
        if self.enable_priority_scheduling and self.schedule_policy != "fcfs":
            raise InvalidRequestError(
                "enable_priority_scheduling goes with schedule_policy='fcfs' only, got "
                f"{self.schedule_policy!r}"
            )
        if self.enable_hierarchical_cache and self.disable_radix_cache:
            raise InvalidRequestError(
                "enable_hierarchical_cache=True keeps cached prefixes in host memory, and "
                "disable_radix_cache=True keeps none"
            )
        if self.enable_deterministic_inference:
            self._check_deterministic()
        SamplingParams.from_dict(self.preferred_params)

    def _check_deterministic(self) -> None:
        """The options that ask for more than one decode program."""
        for name, only in (
            ("cuda_graph_bs", None), ("cuda_graph_max_bs", None), ("num_continuous_decode_steps", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in (None, only):
                raise InvalidRequestError(
                    f"enable_deterministic_inference runs one decode program, of "
                    f"max_running_requests rows and one step: {name}={value!r} contradicts it"
                )

    @property
    def preferred_params(self) -> dict[str, Any]:
        """`preferred_sampling_params` as a dict, empty when not given."""
        return _parsed(self.preferred_sampling_params)

    @property
    def config_overrides(self) -> dict[str, Any]:
        """`json_model_override_args` as a dict."""
        return _parsed(self.json_model_override_args)

    @property
    def attention_implementation(self) -> str | None:
        """The kernel implementation asked for, None for the best one of the device."""
        return self.attention_backend

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Adds a flag for each option, CUDA-only ones included. See `from_cli_args`."""
        defaults = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
        spellings = {name: [name] for name in OPTIONS}
        for alias, name in (*ALIASES.items(), ("model", "model_path"), *_PARALLEL_FLAGS):
            spellings[name].append(alias)
        for name, option in OPTIONS.items():
            flags = ["--" + spelling.replace("_", "-") for spelling in spellings[name]]
            settings: dict[str, Any] = {"dest": name, "help": option.help.replace("%", "%%")}
            if name == "model_path":
                settings["required"] = True
            else:
                settings["default"] = defaults[name]
            if option.kind == "flag":
                optional = argparse.BooleanOptionalAction
                settings["action"] = optional if option.optional else "store_true"
            else:
                settings["type"] = _CLI_TYPES.get(option.kind, str)
            if option.kind == "integers":
                settings["nargs"] = "+"
            parser.add_argument(*flags, **settings)
        for name, default in (*NO_OP.items(), *UNSUPPORTED.items()):
            settings = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            if isinstance(default, bool):
                settings["action"] = "store_true"
            elif isinstance(default, int | float):
                settings["type"] = type(default)
            parser.add_argument("--" + name.replace("_", "-"), **settings)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ServerArgs:
        """The options of parsed flags; attributes of `args` that are no options are left alone."""
        known = {**OPTIONS, **ALIASES, **NO_OP, **UNSUPPORTED}
        return cls(**{name: value for name, value in vars(args).items() if name in known})


_CLI_TYPES = {"integer": int, "integers": int, "number": float}
_PARALLEL_FLAGS = (
    ("tp", "tp_size"),
    ("tensor_parallel_size", "tp_size"),
    ("dp", "dp_size"),
    ("data_parallel_size", "dp_size"),
)


def _sorted_out(options: dict[str, Any]) -> dict[str, Any]:
    """The implemented options under their own names, after the other three classes are dealt
    with: one warning for all no-ops, an error for the first unsupported or unknown one."""
    values: dict[str, Any] = {}
    ignored: list[str] = []
    spelled: dict[str, str] = {}
    for name, value in options.items():
        target = ALIASES.get(name, name)
        if target in OPTIONS:
            # `asdict` of another version's arguments may carry both spellings, one at its default.
            default = _DEFAULTS[target]
            earlier = values.get(target, default)
            if default not in (value, earlier) and value != earlier:
                raise InvalidRequestError(
                    f"{spelled[target]}={earlier!r} and {name}={value!r} are the same option"
                )
            if earlier == default:
                values[target], spelled[target] = value, name
        elif name in NO_OP:
            if not _is_default(value, NO_OP[name]):
                ignored.append(name)
        elif name in UNSUPPORTED:
            if not _is_default(value, UNSUPPORTED[name]):
                raise NotSupportedError(f"{name}={checks.shown(value)} is not supported yet")
        else:
            raise UnknownOptionError(f"unknown option {name!r}{_suggestion(name)}")
    if values.get("attention_backend") in FOREIGN_ATTENTION:
        ignored.append(f"attention_backend={values.pop('attention_backend')!r}")
    if ignored:
        warnings.warn(
            f"ignored, they have no meaning in jaxserve: {', '.join(ignored)}", stacklevel=3
        )
    return values


def _parsed(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value or {})


def _is_default(value: Any, default: Any) -> bool:
    """None and False say "not wanted" for every option of SGLang, whatever its type."""
    return value is None or value is False or value == default


def _suggestion(name: str) -> str:
    if name in HINTS:
        return f" (did you mean {HINTS[name]!r}?)"
    return checks.near_matches(name, (*OPTIONS, *ALIASES, *NO_OP, *UNSUPPORTED))


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
