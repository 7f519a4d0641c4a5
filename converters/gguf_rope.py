"""The RoPE scaling of a GGUF file, in Hugging Face's `rope_parameters` form.

llama.cpp's converter writes linear and YaRN scaling as metadata. Of the Llama 3.1 scaling it
keeps none of the four parameters: it bakes them into the tensor rope_freqs.weight [H/2], the
number by which each frequency is divided. `llama3_parameters` recovers them. LongRoPE's factors are
two tensors, too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from converters.gguf_reader import GGUFFile
from jaxserve.errors import ModelLoadError, NotSupportedError

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_DEFAULT_THETA = 10_000.0
_TOLERANCE = 1e-4
"""Relative; the factors are float32 and pass through a subtraction of near numbers."""
_RELEASED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_RELEASED_CONTEXT = 8192


def rope_parameters(
    file: GGUFFile, arch: str, head_dim: int, *, partial: bool = False
) -> dict[str, Any]:
    """`rope_parameters` of config.json. head_dim: H. partial: less of a head may be rotated.

    Raises NotSupportedError for a scaling that we do not have, ModelLoadError where keys are
    missing or the frequency factors fit no Llama 3.1 scaling.
    """
    prefix = f"{arch}.rope"
    rotated = file.integer(f"{prefix}.dimension_count", head_dim)
    if rotated != head_dim and not (partial and 0 < rotated < head_dim):
        raise NotSupportedError(
            f"{file.path}: {prefix}.dimension_count={rotated} of {head_dim}: a partial rotation is "
            f"not supported for {arch}"
        )
    theta = file.number(f"{prefix}.freq_base", _DEFAULT_THETA)
    if not 1.0 <= theta < math.inf:
        raise ModelLoadError(f"{file.path}: {prefix}.freq_base must be at least 1, got {theta}")
    # A factor without a type is linear, and before 2024 it had a key of its own.
    factor = file.number(f"{prefix}.scaling.factor", file.number(f"{prefix}.scale_linear", 0.0))
    kind = file.string(f"{prefix}.scaling.type", "linear" if factor else "none")
    base: dict[str, Any] = {"rope_theta": theta}
    if partial:
        base["partial_rotary_factor"] = rotated / head_dim
    if LONG in file.tensors and SHORT in file.tensors and kind in ("none", "longrope"):
        return base | _longrope(file, f"{prefix}.scaling")
    if FACTORS in file.tensors:
        if kind not in ("none", "llama3") and factor not in (0.0, 1.0):
            raise NotSupportedError(f"{file.path}: {FACTORS} together with {kind!r} RoPE scaling")
        return base | llama3_parameters(file.read_floats(FACTORS), theta, rotated, file.path)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return base | _yarn(file, f"{prefix}.scaling", factor)
    raise NotSupportedError(
        f"{file.path}: {prefix}.scaling.type={kind!r} is not supported; supported: none, linear, "
        f"yarn, Llama 3.1's through the tensor {FACTORS}, and LongRoPE's through {LONG} and {SHORT}"
    )


def _longrope(file: GGUFFile, prefix: str) -> dict[str, Any]:
    """The converter computes the attention factor, from the stated context and the original one."""
    given = {
        "original_max_position_embeddings": file.integer(f"{prefix}.original_context_length"),
        "attention_factor": file.number(f"{prefix}.attn_factor", None),
        "short_factor": file.read_floats(SHORT).tolist(),
        "long_factor": file.read_floats(LONG).tolist(),
    }
    present = {key: value for key, value in given.items() if value is not None}
    return {"rope_type": "longrope", **present}


def _yarn(file: GGUFFile, prefix: str, factor: float) -> dict[str, Any]:
    """The converter copies config.json's values; attention_factor included, unmultiplied."""
    for key, neutral in (("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0)):
        value = file.number(f"{prefix}.{key}", neutral)
        if value != neutral:
            raise NotSupportedError(f"{file.path}: {prefix}.{key}={value} is not supported")
    if factor < 1.0:
        raise ModelLoadError(f"{file.path}: YaRN needs {prefix}.factor >= 1, got {factor}")
    given = {
        "original_max_position_embeddings": file.integer(f"{prefix}.original_context_length", None),
        "attention_factor": file.number(
            f"{prefix}.yarn_attn_factor", file.number(f"{prefix}.attn_factor", None)
        ),
        "beta_fast": file.number(f"{prefix}.yarn_beta_fast", None),
        "beta_slow": file.number(f"{prefix}.yarn_beta_slow", None),
    }
    present = {key: value for key, value in given.items() if value is not None}
    return {"rope_type": "yarn", "factor": factor, **present}


def llama3_factors(parameters: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What each frequency is divided by under Llama 3.1 scaling: [H/2] float64.

    Source: transformers.modeling_rope_utils, `_compute_llama3_parameters`.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * _turns_per_token(theta, head_dim)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / parameters["factor"] + blend)


def llama3_parameters(
    factors: np.ndarray, theta: float, head_dim: int, path: str
) -> dict[str, Any]:
    """The Llama 3.1 scaling behind `factors` [H/2]: the released one where it fits, else a fit.

    Multiplying both bounds and the original context by one number changes nothing, so a fit has
    low_freq_factor 1. Raises ModelLoadError when the factors are no such scaling.
    """
    if factors.shape != (head_dim // 2,):
        raise ModelLoadError(
            f"{path}: {FACTORS} has shape {factors.shape}, head_dim {head_dim} needs "
            f"{(head_dim // 2,)}"
        )
    factors = factors.astype(np.float64)
    if np.all(factors == 1.0):
        return {"rope_type": "default"}
    factor = _round(float(factors.max()))
    released = _RELEASED | {"original_max_position_embeddings": _RELEASED_CONTEXT}
    sane = np.all((factors >= 1.0 - _TOLERANCE) & np.isfinite(factors))
    guesses = (released, _fit(factors, factor, theta, head_dim)) if sane else ()
    for guess in guesses:
        if guess is not None:
            parameters = {"rope_type": "llama3", "factor": factor, **guess}
            expected = llama3_factors(parameters, theta, head_dim)
            if np.allclose(factors, expected, rtol=_TOLERANCE, atol=0.0):
                return parameters
    raise ModelLoadError(
        f"{path}: the frequency factors in {FACTORS} (from {factors.min():g} to {factors.max():g}) "
        "are not those of a Llama 3.1 RoPE scaling, and no other kind is supported"
    )


def _fit(factors: np.ndarray, factor: float, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Bounds and context from the blended band, where 1/factor is linear in the frequency:
    blend = (context * turns - low) / (high - low). None where the band is too narrow to tell."""
    band = (factors > 1.0 + _TOLERANCE) & (factors < factor * (1.0 - _TOLERANCE))
    if factor <= 1.0 or band.sum() < 2:
        return None
    blend = (1.0 / factors[band] - 1.0 / factor) / (1.0 - 1.0 / factor)
    slope, intercept = np.polyfit(_turns_per_token(theta, head_dim)[band], blend, 1)
    if not slope > 0.0 > intercept:
        return None
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": _round(1.0 - 1.0 / intercept),
        "original_max_position_embeddings": round(-slope / intercept),
    }


def _turns_per_token(theta: float, head_dim: int) -> np.ndarray:
    """Rotations per position of each pair of dimensions: [H/2] float64."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)


def _round(value: float) -> float:
    """Undoes float32 noise around the short decimals that configs hold."""
    return round(value, 4)
