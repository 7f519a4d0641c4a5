"""A command-line flag for each constructor option."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from jaxserve.api.upstream_options import FOREIGN
from jaxserve.options import ALIASES, OPTIONS

TYPES = {"integer": int, "integers": int, "number": float}
FOREIGN_TYPES = {
    "int": int, "float": float, "list[int]": int, "list[float]": float,
}  # fmt: skip
SHORT_FLAGS: Mapping[str, tuple[str, ...]] = {
    "model_path": ("model",),
    "tp_size": ("tp", "tensor_parallel_size"),
    "dp_size": ("dp", "data_parallel_size"),
    "pp_size": ("pp", "pipeline_parallel_size"),
    "ep_size": ("ep", "expert_parallel_size"),
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


def add(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Adds the flags of all options. defaults: of the implemented ones but `model_path`, which is
    required. The others have no help, and are in the namespace only when given."""
    for name, option in OPTIONS.items():
        settings: dict[str, Any] = {"dest": name, "help": option.help.replace("%", "%%")}
        if name in defaults:
            settings["default"] = defaults[name]
        else:
            settings["required"] = True
        if option.kind == "flag":
            optional = argparse.BooleanOptionalAction
            settings["action"] = optional if option.optional else "store_true"
        else:
            settings["type"] = TYPES.get(option.kind, str)
        if option.kind == "integers":
            settings["nargs"] = "+"
        aliases = (alias for alias, target in ALIASES.items() if target == name)
        parser.add_argument(*_flags(name, *aliases), **settings)
    for name, option in FOREIGN.items():
        settings = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if option.kind == "bool":
            settings["action"] = argparse.BooleanOptionalAction if option.optional else "store_true"
        else:
            settings["type"] = FOREIGN_TYPES.get(option.kind, str)
        if option.kind.startswith("list"):
            settings["nargs"] = "*"
        parser.add_argument(*_flags(name), **settings)


def _flags(name: str, *aliases: str) -> list[str]:
    names = (name, *aliases, *SHORT_FLAGS.get(name, ()))
    return ["--" + spelling.replace("_", "-") for spelling in names]
