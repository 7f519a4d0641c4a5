"""Random weights of the right shapes, for speed tests without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from converters.placement import Placement
from jaxserve.models.registry import Declaration

_STD = 0.02


def dummy_params(declaration: Declaration, placement: Placement, seed: int) -> dict[str, jax.Array]:
    """Normal(0, 0.02) weights, norm scales 1. Made on the device, one program per shape."""
    key = jax.random.key(seed)
    programs: dict[Any, Callable[[jax.Array], jax.Array]] = {}
    params = {}
    for index, (path, spec) in enumerate(declaration.specs.items()):
        sharding = placement(path)
        if path.endswith(".scale"):
            params[path] = jnp.ones(spec.shape, spec.dtype, device=sharding)
            continue
        kind = (spec.shape, spec.dtype, sharding)
        if kind not in programs:
            programs[kind] = _program(*kind)
        params[path] = programs[kind](jax.random.fold_in(key, index))
    return params


def _program(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    def draw(key: jax.Array) -> jax.Array:
        # Drawn in float32: bfloat16 draws take 128 different values only.
        return (_STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
