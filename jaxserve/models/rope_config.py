"""Which rotary embedding a config.json asks for, with every number of it checked.

Sources: transformers.modeling_rope_utils (5.x) for the keys; for what a scaling makes of the
context, SGLang's `get_context_length` (srt/hf_transformers_utils).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.models import values
from jaxserve.shown import quoted

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_BY_ORIGINAL = ("yarn", "llama3")
"""Types whose mathematics know an original context of their own."""
_DEFAULT_THETA = 10_000.0
_ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. Hashable: layers of one config share cos and sin."""

    type: str = "default"
    """One of ROPE_TYPES."""
    theta: float = _DEFAULT_THETA
    """Base of the geometric series of frequencies."""
    factor: float = 1.0
    """How far the context is stretched; 1 for "default"."""
    original_max_positions: int = 0
    """Tokens that the model was pretrained on, before stretching."""
    context_factor: float = 1.0
    """What the context that the config states is to be multiplied by: `factor`, or 1 where an
    original context says that the stated one is the stretched one."""
    low_freq_factor: float = 1.0
    """Of "llama3": lower bound of the band that is blended, in turns over the original context."""
    high_freq_factor: float = 1.0
    """Of "llama3": its upper bound."""
    beta_fast: float = 32.0
    """Of "yarn": where its ramp begins, in rotations over the original context."""
    beta_slow: float = 1.0
    """Of "yarn": where it ends."""
    truncate: bool = True
    """Of "yarn": the ramp's bounds are whole dimensions."""
    attention_factor: float = 1.0
    """What "yarn" multiplies cos and sin by; 1 elsewhere."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older).

        Raises NotSupportedError for other types and for a partial rotation, ModelLoadError when a
        key that the type needs is missing or has a value that it cannot have.
        """
        # transformers lets a `rope_scaling` that is present win over `rope_parameters`.
        parameters = values.table(hf, "rope_parameters")
        given = values.table(hf, "rope_scaling") or parameters
        if any(isinstance(value, dict) for value in given.values()):
            raise NotSupportedError(
                f"config.json: RoPE parameters by kind of layer are not supported, got "
                f"{quoted(given)}"
            )
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise NotSupportedError(
                f"config.json asks for rope type {quoted(kind)}; supported: {', '.join(ROPE_TYPES)}"
            )
        partial = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise NotSupportedError(
                f"partial_rotary_factor={quoted(partial)} is not supported, only 1.0"
            )
        # A `rope_scaling` given as an override keeps the base that the file states elsewhere.
        stated = next((x for x in (given, hf, parameters) if x.get("rope_theta") is not None), {})
        theta = values.number(stated, "rope_theta", _DEFAULT_THETA, least=1)
        if kind == "default":
            return cls(theta=theta)
        if given.get(_ORIGINAL) is None and hf.get(_ORIGINAL) is not None and kind in _BY_ORIGINAL:
            given[_ORIGINAL] = hf[_ORIGINAL]
        original = values.size(given, _ORIGINAL, max_position_embeddings)
        if kind == "yarn" and "factor" in given and given["factor"] is None:
            given["factor"] = max_position_embeddings / original
        needed = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (kind == "llama3")
        missing = [key for key in needed if given.get(key) is None]
        if missing:
            raise ModelLoadError(
                f"config.json: rope type {kind!r} needs {', '.join(missing)}, got {quoted(given)}"
            )
        factor = values.number(given, "factor", least=1)
        own = given.get(_ORIGINAL) is not None or kind == "llama3"
        return cls(
            type=kind,
            theta=theta,
            factor=factor,
            original_max_positions=original if kind in _BY_ORIGINAL else max_position_embeddings,
            context_factor=1.0 if own else factor,
            **{"yarn": _yarn, "llama3": _llama3}.get(kind, _nothing_more)(given, theta, factor),
        )


def _nothing_more(given: Mapping[str, Any], theta: float, factor: float) -> dict[str, Any]:
    return {}


def _llama3(given: Mapping[str, Any], theta: float, factor: float) -> dict[str, Any]:
    low = values.number(given, "low_freq_factor", least=0)
    return {
        "low_freq_factor": low,
        "high_freq_factor": values.number(given, "high_freq_factor", above=low),
    }


def _yarn(given: Mapping[str, Any], theta: float, factor: float) -> dict[str, Any]:
    if theta == 1:
        raise values.bad("rope_theta", "above 1 for YaRN", theta)
    slow = values.number(given, "beta_slow", 1.0, above=0)
    return {
        "beta_fast": values.number(given, "beta_fast", 32.0, least=slow),
        "beta_slow": slow,
        "truncate": values.flag(given, "truncate", True),
        "attention_factor": _temperature(given, factor),
    }


def _temperature(given: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor of cos and sin: 0.1 ln(factor) + 1, or a ratio of two such terms (DeepSeek)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    one = values.number(given, "mscale", 0.0, least=0)
    other = values.number(given, "mscale_all_dim", 0.0, least=0)
    default = mscale(one) / mscale(other) if one and other else mscale(1.0)
    return values.number(given, "attention_factor", default, above=0)
