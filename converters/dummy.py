"""Random weights of the right shapes, for speed tests without a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from converters.parts import filled
from converters.placement import Placement
from converters.whole import Whole
from jaxserve.models.quantization import quantize
from jaxserve.models.registry import Declaration

_STD = 0.02


def dummy_params(
    wanted: Declaration | Whole, placement: Placement, seed: int
) -> dict[str, jax.Array]:
    """Normal(0, 0.02) weights, norm scales 1. Made on the device, one program per shape.

    Quantized kernels are drawn as without quantization, and quantized by the same program.
    """
    key = jax.random.key(seed)
    specs, scales = wanted.specs, wanted.scales
    programs: dict[Any, Callable[[jax.Array], Any]] = {}
    params = {}
    drawn = [path for path in specs if path not in scales.values()]
    for index, path in enumerate(drawn):
        spec, sharding = specs[path], placement(path)
        if path.endswith(".scale"):
            params[path] = jnp.ones(spec.shape, spec.dtype, device=sharding)
            continue
        quantized = None
        if path in scales:
            quantized, sharding = spec.dtype, (sharding, placement(scales[path]))
        kind = (spec.shape, wanted.dtype, quantized, sharding)
        if kind not in programs:
            programs[kind] = _program(*kind)
        made = programs[kind](jax.random.fold_in(key, index))
        kept = filled(wanted.parts_of(path)) if isinstance(wanted, Whole) else None
        if kept is not None:
            params[path] = _padded(made, *kept)
        elif quantized is None:
            params[path] = made
        else:
            params[path], params[scales[path]] = made
    return {path: params[path] for path in specs}


@functools.partial(jax.jit, donate_argnums=0)
def _padded(made: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Zeros where no checkpoint has numbers."""
    return jnp.where((rows[:, None] & columns).reshape(made.shape), made, 0)


def _program(
    shape: tuple[int, ...], dtype: Any, quantized: Any, sharding: Sharding | tuple[Sharding, ...]
) -> Callable[[jax.Array], Any]:
    def draw(key: jax.Array) -> Any:
        # Drawn in float32: bfloat16 draws take 128 different values only.
        weights = (_STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        return weights if quantized is None else quantize(weights, quantized)

    return jax.jit(draw, out_shardings=sharding)
