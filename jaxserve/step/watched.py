"""What a step sees of a model's inner layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import PagedOps
from jaxserve.models.ops import Residual


class Watched:
    """Keeps the residual stream between layers while a model is traced: a `decoder.Watch`. What is
    not wanted is not traced."""

    def __init__(self, ops: PagedOps, layers: tuple[int, ...]) -> None:
        """layers: as `States.layers` counts them."""
        self._ops = ops
        self._layers = layers
        self._found: dict[int, jax.Array] = {}

    def __call__(self, index: int, stream: Residual) -> None:
        if index in self._layers:
            self._found[index] = self._ops.total(stream)

    def stacked(self, hidden: jax.Array) -> jax.Array | None:
        """[T, C, D] of the C layers; hidden [T, D] is that behind all of them, after the final
        norm. None: there are none."""
        if not self._layers:
            return None
        found = [self._found.get(index, hidden) for index in self._layers]
        return jnp.stack(found, axis=1)
