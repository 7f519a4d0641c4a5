"""A command-line flag for each constructor option."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from jaxserve.options.option import Option
from jaxserve.options.table import OPTIONS
from jaxserve.options.upstream import FOREIGN, UpstreamOption

TYPES = {"integer": int, "integers": int, "number": float}
FOREIGN_TYPES = {
    "int": int,
    "float": float,
    "list[int]": int,
    "list[float]": float,
}
FOREIGN_FLAGS: Mapping[str, tuple[str, ...]] = {
    "attn_cp_size": ("attention_context_parallel_size",),
    "moe_dp_size": ("moe_data_parallel_size",),
    "dcp_size": ("decode_context_parallel_size",),
    "dist_init_addr": ("nccl_init_addr",),
    "speculative_draft_model_path": ("speculative_draft_model",),
    "fp8_gemm_runner_backend": ("fp8_gemm_backend",),
    "fp4_gemm_runner_backend": ("fp4_gemm_backend",),
    "ep_join_mode": ("elastic_ep_join_mode",),
    "smg_http_sidecar_port": ("grpc_http_sidecar_port",),
}
"""SGLang's further spellings, on its command line only."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all options. Those that jaxserve does not have are without help, and in the
    namespace only when given."""
    for option in OPTIONS.values():
        if option.kind != "mesh":
            flags = _flags(option.name, option.spellings, option.flags)
            parser.add_argument(*flags, **_settings(option))
    for name, option in FOREIGN.items():
        parser.add_argument(*_flags(name, FOREIGN_FLAGS.get(name, ())), **_foreign_settings(option))


def _settings(option: Option) -> dict[str, Any]:
    settings: dict[str, Any] = {"dest": option.name, "help": option.help.replace("%", "%%")}
    if option.required:
        settings["required"] = True
    else:
        settings["default"] = option.present_default()
    if option.kind == "flag":
        settings["action"] = _flag_action(option.optional)
    else:
        settings["type"] = TYPES.get(option.kind, str)
    if option.kind in ("integers", "strings"):
        settings["nargs"] = "+" if option.kind == "integers" else "*"
    return settings


def _foreign_settings(option: UpstreamOption) -> dict[str, Any]:
    settings = {"dest": option.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if option.kind == "bool":
        settings["action"] = _flag_action(option.optional)
    else:
        settings["type"] = FOREIGN_TYPES.get(option.kind, str)
    if option.kind.startswith("list"):
        settings["nargs"] = "*"
    return settings


def _flag_action(optional: bool) -> Any:
    return argparse.BooleanOptionalAction if optional else "store_true"


def _flags(name: str, *further: Iterable[str]) -> list[str]:
    names = (name, *(spelling for spellings in further for spelling in spellings))
    return ["--" + spelling.replace("_", "-") for spelling in names]
