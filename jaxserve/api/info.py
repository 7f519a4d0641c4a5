"""Small objects and dicts that the engine's control methods return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jaxserve
from jaxserve import checks
from jaxserve.api.model_facts import ModelFacts
from jaxserve.errors import InvalidRequestError
from jaxserve.server_args import ServerArgs

if TYPE_CHECKING:
    from jaxserve.config import Limits


@dataclasses.dataclass(frozen=True, slots=True)
class FlushResult:
    """What `flush_cache` returns."""

    success: bool
    """False, and nothing is forgotten, while requests are queued or running."""
    message: str
    """The same as a sentence."""

    @classmethod
    def of(cls, success: bool) -> FlushResult:
        message = (
            "Cache flushed." if success else "Cache not flushed: requests are queued or running."
        )
        return cls(success, message)


class TokenizerManager:
    """What users reach for through `engine.tokenizer_manager`, under upstream's names."""

    is_generation = True
    """There are no embedding models."""

    def __init__(
        self,
        server_args: ServerArgs,
        tokenizer: Any,
        abort: Callable[[str, bool], None],
        limits: Limits,
        model_config: ModelFacts,
    ) -> None:
        self.server_args = server_args
        """The engine's, which cannot be changed."""
        self.tokenizer = tokenizer
        """A transformers tokenizer; None with skip_tokenizer_init."""
        self.model_config = model_config
        """The model's sizes."""
        self.model_path = server_args.model_path
        """As it was given."""
        self.served_model_name = server_args.served_model_name or server_args.model_path
        """The option, or the path."""
        self.preferred_sampling_params = server_args.preferred_params or None
        """Defaults under each request's sampling parameters, if there are any."""
        self.context_len = limits.context_length
        """Tokens of prompt and output."""
        self.max_req_input_len = longest_input(limits)
        """Tokens of a prompt."""
        self._abort = abort

    def abort_request(self, rid: str | None = "", abort_all: bool = False) -> None:
        """`Engine.abort_request`."""
        if not isinstance(rid, str | None):
            raise InvalidRequestError(f"rid must be a string, got {checks.shown(rid)}")
        self._abort(rid or "", checks.boolean("abort_all", abort_all))


def longest_input(limits: Limits) -> int:
    """Tokens of the longest prompt, with one place left for an output."""
    return limits.longest - 1


def server_info(args: ServerArgs, limits: Limits, stats: Mapping[str, Any]) -> dict[str, Any]:
    """`get_server_info()`: upstream's option names (those without a meaning here at upstream's
    defaults), jaxserve's options, then state. `stats` are the engine loop's counters."""
    info = dict(vars(args))
    info["tokenizer_path"] = args.tokenizer_path or args.model_path
    info["served_model_name"] = args.served_model_name or args.model_path
    info["dp_size"], info["tp_size"] = args.mesh_shape
    info["mesh"] = None if args.mesh is None else str(args.mesh)
    running = [each for each in stats.get("replicas", [stats]) if "max_total_num_tokens" in each]
    return info | {
        **stats,
        "status": "ready",
        "version": jaxserve.VERSION,
        "max_req_input_len": longest_input(limits),
        "internal_states": [_internal_state(each) for each in running],
    }


def _internal_state(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Of one replica."""
    memory = stats.get("memory_usage", {})
    return {
        "last_gen_throughput": stats.get("last_gen_throughput"),
        "memory_usage": {**memory, "token_capacity": stats["max_total_num_tokens"]},
        "effective_max_running_requests_per_dp": stats.get("max_running_requests"),
    }


def model_info(args: ServerArgs, load_format: str, quantization: str | None) -> dict[str, Any]:
    """`get_model_info()`. load_format, quantization: of what was loaded."""
    return {
        "model_path": args.model_path,
        "tokenizer_path": args.tokenizer_path or args.model_path,
        "served_model_name": args.served_model_name or args.model_path,
        "is_generation": True,
        "weight_version": args.weight_version,
        "load_format": load_format,
        "quantization": quantization,
        "reasoning_parser": None,
        "tool_call_parser": None,
    }
