"""Options that are right alone and wrong together."""

from __future__ import annotations

from jaxserve.errors import InvalidRequestError, NotSupportedError
from jaxserve.options.table import OPTIONS, Options

PLACES = ("tp_size", "dp_size", "base_gpu_id", "gpu_id_step", "device")
"""Options that say what a mesh says."""


def check_together(options: Options) -> None:
    """Raises InvalidRequestError for options that contradict each other, NotSupportedError for
    sizes that no engine can be built with yet (parallelism)."""
    for name, option in OPTIONS.items():
        if option.only is not None and getattr(options, name) != option.only:
            raise NotSupportedError(f"{name}={getattr(options, name)} is not supported yet")
    _check_mesh(options)
    if options.chunked_prefill_size == 0:
        raise InvalidRequestError("chunked_prefill_size must be -1 or at least 1, got 0")
    if options.enable_priority_scheduling and options.schedule_policy != "fcfs":
        raise InvalidRequestError(
            "enable_priority_scheduling goes with schedule_policy='fcfs' only, got "
            f"{options.schedule_policy!r}"
        )
    if options.enable_hierarchical_cache and options.disable_radix_cache:
        raise InvalidRequestError(
            "enable_hierarchical_cache=True keeps cached prefixes in host memory, and "
            "disable_radix_cache=True keeps none"
        )
    if options.hidden_state_layers and not (
        options.enable_return_hidden_states or options.return_hidden_states_mode
    ):
        raise InvalidRequestError(
            f"hidden_state_layers={list(options.hidden_state_layers)} needs "
            "enable_return_hidden_states=True"
        )
    if options.enable_return_hidden_states and options.return_hidden_states_mode == "last":
        raise InvalidRequestError(
            "enable_return_hidden_states=True allows all positions, and "
            "return_hidden_states_mode='last' only one"
        )
    if options.enable_deterministic_inference:
        _check_deterministic(options)


def _check_mesh(options: Options) -> None:
    for name in PLACES:
        value = getattr(options, name)
        if options.mesh is not None and value != OPTIONS[name].default:
            raise InvalidRequestError(
                f"mesh says which devices are used, and {name}={value!r} contradicts it"
            )


def _check_deterministic(options: Options) -> None:
    """The options that ask for more than one decode program."""
    for name, only in (
        ("cuda_graph_bs", None),
        ("cuda_graph_max_bs", None),
        ("num_continuous_decode_steps", 1),
    ):
        value = getattr(options, name)
        if value not in (None, only):
            raise InvalidRequestError(
                f"enable_deterministic_inference runs one decode program, of "
                f"max_running_requests rows and one step: {name}={value!r} contradicts it"
            )
