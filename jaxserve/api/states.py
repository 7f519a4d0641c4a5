"""The arguments of a call that ask for hidden states and logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxserve import checks
from jaxserve.api.prompts import per_row
from jaxserve.errors import InvalidRequestError
from jaxserve.output.states import HiddenStates, LayerHiddenStates, Logits, StateExtra, StateSpec

if TYPE_CHECKING:
    from jaxserve.api.extras import Asking
    from jaxserve.api.rules import CheckedPrompt
    from jaxserve.config import Limits

HIDDEN_OPTION, LOGITS_OPTION = "enable_return_hidden_states", "enable_return_logits"


def hidden_specs(asking: Asking) -> list[StateSpec | None] | None:
    """Which prompts of a call want hidden states; None: none."""
    given, mode = asking.given.return_hidden_states, asking.limits.states.hidden
    if given is False:
        return None
    name = "return_hidden_states"
    values = _values(name, given, asking.prompts)
    _check_started(name, values, mode is not None, HIDDEN_OPTION)
    if mode == "last" and True in values:
        raise InvalidRequestError(
            "return_hidden_states=True needs Engine(enable_return_hidden_states=True); "
            "return_hidden_states_mode='last' allows 'last' only"
        )
    return _specs(HiddenStates, values, asking.limits.hidden_size)


def layer_specs(asking: Asking) -> list[StateSpec | None] | None:
    """Those of inner layers come with them, where the engine has any."""
    limits = asking.limits
    layers, given = limits.states.layers, asking.given.return_hidden_states
    if given is False or not layers:
        return None
    values = _values("return_hidden_states", given, asking.prompts)
    return _specs(LayerHiddenStates, values, len(layers) * limits.hidden_size, layers)


def logit_specs(asking: Asking) -> list[StateSpec | None] | None:
    """Which prompts of a call want logits; None: none."""
    given, limits = asking.given.return_logits, asking.limits
    if given is False:
        return None
    name = "return_logits"
    values = _values(name, given, asking.prompts)
    _check_started(name, values, limits.states.logits, LOGITS_OPTION)
    return _specs(Logits, values, limits.vocab_size)


def check_bytes(limits: Limits, rows: Iterable[CheckedPrompt], samples: int) -> None:
    """Raises InvalidRequestError for a call that might return more than the engine allows."""
    requests = total = 0
    for row in rows:
        sizes = [spec.num_bytes(len(row.prompt_ids), row.max_new_tokens) for spec in row.extras]
        requests += samples * bool(sum(sizes))
        total += samples * sum(sizes)
    if total > limits.max_state_bytes:
        raise InvalidRequestError(
            f"return_hidden_states and return_logits ask for up to {total:,} bytes (float32, "
            f"{requests} requests with all of their max_new_tokens), and max_state_bytes allows a "
            f"call {limits.max_state_bytes:,}: ask for 'last', for fewer at a time, or give "
            "Engine(max_state_bytes=...)"
        )


def _values(name: str, given: Any, prompts: int) -> list[bool | str]:
    """False, True or "last" for each prompt."""
    values = per_row(name, given, prompts)
    return [_value(name, value) for value in values]


def _value(name: str, value: Any) -> bool | str:
    if value is None or (isinstance(value, str) and value == "last"):
        return value or False
    if isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a bool or 'last', got {checks.shown(value)}")
    return checks.boolean(name, value)


def _check_started(name: str, values: list[bool | str], started: bool, option: str) -> None:
    asked = next(filter(None, values), False)
    if asked and not started:
        raise InvalidRequestError(f"{name}={asked!r} needs Engine({option}=True)")


def _specs(
    kind: type[StateExtra], values: list[bool | str], width: int, layers: tuple[int, ...] = ()
) -> list[StateSpec | None] | None:
    """width: numbers of a position."""
    if not any(values):
        return None
    specs = {
        value: StateSpec(kind, value == "last", width, layers) if value else None
        for value in dict.fromkeys(values)
    }
    return [specs[value] for value in values]
