"""A temperature at a place of its own in a chain."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.transforms.context import Context
from jaxserve.transforms.transform import Params, State, Transform

COLDEST = 1e-5
"""Below, only the best token is left: quotients would not be finite."""


def temperature() -> Transform:
    """Logits divided by a temperature (Ackley et al. 1985, "A Learning Algorithm for Boltzmann
    Machines"), before what follows in the chain. The sampling parameter of this name divides once
    more, at the end.

    `temperature` (1.0): 0 leaves the likeliest tokens alone.
    """

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        divisor = params["temperature"]
        best = jnp.where(logits == context.top(logits), logits, -jnp.inf)
        return jnp.where(divisor < COLDEST, best, logits / jnp.maximum(divisor, COLDEST))

    return Transform(apply, params={"temperature": 1.0}, ranges={"temperature": (0, None)})
