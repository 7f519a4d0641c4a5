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

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_BY_ORIGINAL = ("yarn", "llama3", "longrope")
"""Types whose mathematics know an original context of their own."""
_DEFAULT_THETA = 10_000.0
_ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as config.json's `layer_types` names them."""
_PARTIAL = "partial_rotary_factor"
_NEEDED = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
"""Keys without which a type means nothing, besides its factor."""


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
    """What "yarn" and "longrope" multiply cos and sin by; 1 elsewhere."""
    sections: tuple[int, ...] = ()
    """Of "M-RoPE": how many of the pairs turn by time, by row and by column (Wang et al. 2024);
    empty where a token has one position."""
    sections_interleaved: bool = False
    """The pairs of the three alternate, beginning with time, as long as row and column have any;
    the rest is time's (Qwen3-VL). Else time's come first, then row's, then column's."""
    partial: float = 1.0
    """Share of the head dim that is rotated; 0 is no rotation at all, see `NO_ROPE`."""
    short_factor: tuple[float, ...] = ()
    """Of "longrope": what each pair's frequency is divided by within the original context."""
    long_factor: tuple[float, ...] = ()
    """Of "longrope": the same beyond it."""
    long: bool = False
    """Of "longrope": which of both counts. One of them for all tokens, so that results depend
    neither on batch mates nor on what a prefix cache holds: see `within`."""

    def rotated(self, head_dim: int) -> int:
        """r: dimensions of a head that are rotated, as Hugging Face rounds them."""
        return int(head_dim * self.partial)

    def within(self, context: int) -> RopeConfig:
        """For sequences of at most `context` tokens: "longrope" takes the long factors iff those
        may be more than the original context. (Hugging Face decides by each sequence's length, and
        again as it grows; vLLM by the engine's context, as here.)"""
        if self.type != "longrope":
            return self
        return dataclasses.replace(self, long=context > self.original_max_positions)

    def check(self, head_dim: int) -> None:
        """Raises ModelLoadError where heads of `head_dim` cannot be rotated so."""
        rotated = self.rotated(head_dim)
        if rotated % 2:
            raise ModelLoadError(
                f"config.json: partial_rotary_factor={self.partial:g} of head_dim={head_dim} is "
                f"{rotated} dimensions; RoPE needs pairs"
            )
        if self.type == "dynamic" and rotated == 2:
            raise ModelLoadError(
                f"config.json: head_dim={head_dim} has no dynamic RoPE, which needs more than one "
                "pair of dimensions"
            )
        if self.sections and sum(self.sections) != rotated // 2:
            raise ModelLoadError(
                f"config.json: mrope_section={list(self.sections)} must sum to {rotated // 2}, "
                f"half of what is rotated of head_dim={head_dim}"
            )
        for key, found in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if self.type == "longrope" and len(found) != rotated // 2:
                raise ModelLoadError(
                    f"config.json: {key} of rope type 'longrope' must be {rotated // 2} numbers, "
                    f"one for each pair, got {len(found)}"
                )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older).

        Raises NotSupportedError for other types, ModelLoadError when a key that the type needs is
        missing or has a value that it cannot have.
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
        if kind == "mrope":
            kind = "default"
        if kind == "su" or (kind == "yarn" and "short_factor" in given):
            kind = "longrope"  # its names in the first Phi-3
        if kind not in ROPE_TYPES:
            raise NotSupportedError(
                f"config.json asks for rope type {quoted(kind)}; supported: {', '.join(ROPE_TYPES)}"
            )
        partial = _partial(given if given.get(_PARTIAL) is not None else hf)
        # A `rope_scaling` given as an override keeps the base that the file states elsewhere.
        stated = next((x for x in (given, hf, parameters) if x.get("rope_theta") is not None), {})
        usual = hf.get("default_theta", _DEFAULT_THETA)  # a family's, of its `hf_defaults`
        theta = values.number(stated, "rope_theta", usual, least=1)
        sections = _sections(given, kind)
        if kind == "default":
            return cls(theta=theta, partial=partial, **sections)
        if given.get(_ORIGINAL) is None and hf.get(_ORIGINAL) is not None and kind in _BY_ORIGINAL:
            given[_ORIGINAL] = hf[_ORIGINAL]
        original = values.size(given, _ORIGINAL, max_position_embeddings)
        stretched = max_position_embeddings / original
        if kind == "yarn" and "factor" in given and given["factor"] is None:
            given["factor"] = stretched
        if kind == "longrope" and given.get("factor") is None:
            given["factor"] = max(stretched, 1.0)
        needed = ["factor", *_NEEDED.get(kind, ())]
        missing = [key for key in needed if given.get(key) is None]
        if missing:
            raise ModelLoadError(
                f"config.json: rope type {kind!r} needs {', '.join(missing)}, got {quoted(given)}"
            )
        factor = values.number(given, "factor", least=1)
        own = given.get(_ORIGINAL) is not None or kind in ("llama3", "longrope")
        return cls(
            type=kind,
            theta=theta,
            factor=factor,
            original_max_positions=original if kind in _BY_ORIGINAL else max_position_embeddings,
            context_factor=1.0 if own else factor,
            partial=partial,
            **sections,
            **_MORE.get(kind, _nothing_more)(given, theta, factor),
        ).within(max_position_embeddings)


NO_ROPE = RopeConfig(partial=0.0)
"""Of layers that see no positions (NoPE, Kazemnejad et al. 2023)."""


def of_kind(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """config.json as it would be if all layers were of `kind` (FULL or SLIDING), for families whose
    kinds of layers have RoPE parameters of their own (Gemma 3, OLMo-3).

    transformers 5 writes `rope_parameters` = {full_attention: {...}, sliding_attention: {...}}.
    Before, `rope_theta` and `rope_scaling` were those of the layers that see everything; the others
    were not scaled, and had the base `rope_local_base_freq`, or the same where there was none.
    """
    parameters = values.table(hf, "rope_parameters")
    nested = FULL in parameters or SLIDING in parameters
    if kind == FULL:
        return {**hf, "rope_parameters": values.table(parameters, FULL) if nested else parameters}
    own = values.table(parameters, SLIDING) if nested else {}
    bases = [hf.get("rope_local_base_freq"), hf.get("rope_theta")]
    bases += [] if nested else [parameters.get("rope_theta")]
    theta = next((base for base in bases if base is not None), None)
    return {**hf, "rope_parameters": own, "rope_scaling": None, "rope_theta": theta}


def _sections(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Of M-RoPE, which is a key beside any type's ("mrope" of older files is "default")."""
    found = given.get("mrope_section")
    if found is None:
        return {}
    if not isinstance(found, (list, tuple)) or len(found) != 3:
        raise values.bad("mrope_section", "three integers", found)
    if kind == "dynamic":
        raise NotSupportedError("config.json: mrope_section with rope type 'dynamic'")
    sections = tuple(values.size({"mrope_section": x}, "mrope_section") for x in found)
    return {
        "sections": sections,
        "sections_interleaved": values.flag(given, "mrope_interleaved"),
    }


def _partial(stated: Mapping[str, Any]) -> float:
    partial = values.number(stated, _PARTIAL, 1.0, above=0)
    if partial > 1:
        raise values.bad(_PARTIAL, "at most 1", partial)
    return partial


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


def _longrope(given: Mapping[str, Any], theta: float, factor: float) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024) as Phi-3 has it: cos and sin are multiplied by
    sqrt(1 + ln(factor) / ln(original context))."""
    original = values.size(given, _ORIGINAL)
    if original == 1:
        raise values.bad(_ORIGINAL, "more than 1 for longrope", original)
    default = math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "short_factor": values.numbers(given, "short_factor", above=0),
        "long_factor": values.numbers(given, "long_factor", above=0),
        "attention_factor": values.number(given, "attention_factor", default, above=0),
    }


_MORE = {"yarn": _yarn, "llama3": _llama3, "longrope": _longrope}
"""What some types have more."""
