"""Rotary position embedding and its scalings.

Letters: T tokens, N heads (query or KV), H head dim. Everything is float32.
Sources: RoFormer (Su et al. 2021); linear: kaiokendev; dynamic NTK: bloc97 and emozilla;
YaRN: Peng et al. 2023; llama3: the Llama 3.1 release; longrope: Ding et al. 2024, as in Phi-3. The
numbers follow `transformers.modeling_rope_utils` (5.x).

Pairs are always (i, H/2 + i). Where a checkpoint has others, or rotates a part of a head only,
its q and k are reordered as they are loaded (`converters.head_order`): the r dimensions that are
rotated are then the first r/2 pairs, and the others are turned by an angle of 0.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each of the r/2 pairs of dimensions that are rotated: [r/2] float32.

    For "dynamic" these are the frequencies inside the original context (unscaled).
    """
    rotated = rope.rotated(head_dim)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.type == "linear":
        return plain / np.float32(rope.factor)
    if rope.type == "llama3":
        return _llama3(plain, rope)
    if rope.type == "yarn":
        return _yarn(plain, rope, rotated)
    if rope.type == "longrope":
        factors = rope.long_factor if rope.long else rope.short_factor
        return plain / np.array(factors, np.float32)
    return plain


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Short wavelengths stay, long ones are divided by `factor`, the band between is blended."""
    turns = rope.original_max_positions * plain / np.float32(2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return (1 - blend) * plain / np.float32(rope.factor) + blend * plain


def _yarn(plain: np.ndarray, rope: RopeConfig, rotated: int) -> np.ndarray:
    """As llama3, with a ramp that is linear in the dimension instead of in the frequency."""

    def dimension(rotations: float) -> float:
        wavelength = rope.original_max_positions / (rotations * 2 * math.pi)
        return rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    ramp = ramp.astype(np.float32)
    return plain / np.float32(rope.factor) * ramp + plain * (1 - ramp)


def cos_sin(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions [T] int32, or [3, T] where `rope` has sections -> cos, sin [T, H/2] float32.

    [3, T]: time, row and column of a token; three equal ones are the same as that one, in [T].

    "dynamic" in an engine that keeps rotated keys: the frequencies of a token are a function of
    its own position p only. Up to `original_max_positions` they are the unscaled ones, as in
    Hugging Face. Beyond, they are the ones for a context of p + 1 tokens: what Hugging Face uses
    when it generates that token one at a time with a KV cache. So prompts within the original
    context, and whatever is generated after them, equal Hugging Face. A *prompt* longer than the
    original context does not: there Hugging Face rotates every token for the whole prompt's
    length, which would make a token's keys depend on the tokens after it, and results depend on
    chunking, retraction and batch mates.
    """
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))
    if rope.type == "dynamic":
        length = (positions + 1).astype(jnp.float32)
        stretch = rope.factor * length / rope.original_max_positions - (rope.factor - 1)
        stretch = jnp.maximum(stretch, 1.0)[:, None]
        rotated = rope.rotated(head_dim)
        exponents = jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated
        # theta' = theta * stretch ** (r / (r - 2)); the division by theta' ** exponent is split
        # so that a stretch of 1 leaves the unscaled frequencies bit for bit.
        frequencies = frequencies / stretch ** (exponents * rotated / (rotated - 2))
    three = positions.ndim == 2
    each = positions[_axes(rope, head_dim)].T if three else positions[:, None]  # [T, r/2 or 1]
    angles = each.astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    still = ((0, 0), (0, head_dim // 2 - angles.shape[1]))
    return jnp.pad(cos, still, constant_values=1.0), jnp.pad(sin, still)


def _axes(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Which of its token's three positions each pair turns by: [r/2]. ValueError: none of them."""
    count = rope.rotated(head_dim) // 2
    if sum(rope.sections) != count:
        raise ValueError(f"{rope.sections} are no sections of {count} pairs")
    if not rope.sections_interleaved:
        return np.repeat(np.arange(3), rope.sections)
    pairs = np.arange(count)
    axis = pairs % 3
    return np.where(pairs < 3 * np.asarray(rope.sections)[axis], axis, 0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [T, N, H] rotated by cos, sin [T, H/2]; pairs are (i, i + H/2), as in Hugging Face.

    Returns x's dtype; computed in float32.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
