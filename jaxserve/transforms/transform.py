"""What changes the distribution that a token is drawn from: three pure functions of one row.

The engine maps them over the rows of a step and compiles them into the program that draws. `apply`
changes no state, so that it can be asked about several positions before anybody knows how far the
text goes; `observe` is told of each token that was drawn, now or when a request is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.transforms.context import Context

State = Any
"""A pytree of arrays of fixed shapes."""
Params = Mapping[str, Any]
"""By name: scalars and small arrays of a request, float32 or int32; and the tables, which are the
same for all requests."""

Ranges = Mapping[str, tuple[float | None, float | None]]
"""By the names of parameters."""


def no_state(params: Params) -> State:
    return ()


def keep_state(state: State, params: Params, token: jax.Array, logprob: jax.Array) -> State:
    return state


class Transform(NamedTuple):
    """Of one row. All three functions are traced: no Python branch may depend on a value."""

    apply: Callable[[jax.Array, State, Params, Context], jax.Array]
    """(logits [V] float32, state, params, context) -> logits [V] float32. -inf is never drawn; one
    token at least must be finite."""
    init: Callable[[Params], State] = no_state
    """params -> the state before the first token."""
    observe: Callable[[State, Params, jax.Array, jax.Array], State] = keep_state
    """(state, params, token int32, its logprob float32) -> the state after that token. The logprob
    is that of results: after all transforms and the temperature, before top-k, top-p and min-p."""
    params: Params = MappingProxyType({})
    """Names and defaults of the parameters that it reads. A default says the dtype and shape."""
    ranges: Ranges = MappingProxyType({})
    """The least and largest value that a request may give a parameter, or each of its numbers;
    None: there is no such bound."""
    tables: Mapping[str, Any] = MappingProxyType({})
    """Arrays that it reads, by name."""
    keeps_top: bool = False
    """Whether the largest logit always stays as it is, and none becomes larger: then a chain need
    not look for it again, see `Context.top`."""


def chain(*transforms: Transform) -> Transform:
    """One after the other: each sees what those before it have left, as in Hugging Face's lists of
    processors. ValueError: two have a parameter or a table of the same name and differ in it."""

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        top = context.known_top
        for each, own in zip(transforms, state, strict=True):
            top = logits.max() if top is None else top  # nothing, where nobody asks
            given = dataclasses.replace(context, known_top=top)
            logits = each.apply(logits, own, params, given)
            top = top if each.keeps_top else None
        return logits

    return Transform(apply, *_together(transforms))


def joint(*filters: Transform) -> Transform:
    """All of `filters` judge the same logits, and a token stays that none of them removes (makes
    -inf). As the sampling parameters top_k, top_p and min_p do. ValueError: as `chain`."""

    def apply(logits: jax.Array, state: State, params: Params, context: Context) -> jax.Array:
        kept = jnp.ones(logits.shape, bool)
        for each, own in zip(filters, state, strict=True):
            kept &= each.apply(logits, own, params, context) > -jnp.inf
        # of filters that leave nothing in common, the best token stays
        kept = jnp.where(kept.any(), kept, logits == context.top(logits))
        return jnp.where(kept, logits, -jnp.inf)

    return Transform(apply, *_together(filters))


def _together(
    transforms: tuple[Transform, ...],
) -> tuple[Callable[..., State], Callable[..., State], Params, Ranges, Mapping[str, Any], bool]:
    """What several transforms have besides `apply`; their states are a tuple."""

    def init(params: Params) -> State:
        return tuple(each.init(params) for each in transforms)

    def observe(state: State, params: Params, token: jax.Array, logprob: jax.Array) -> State:
        pairs = zip(transforms, state, strict=True)
        return tuple(each.observe(own, params, token, logprob) for each, own in pairs)

    merged: dict[str, Any] = {}
    for each in transforms:
        for name, default in each.params.items():
            known = merged.setdefault(name, default)
            if repr(known) != repr(default):
                raise ValueError(
                    f"two transforms have a parameter {name!r}, with the defaults {known!r} and "
                    f"{default!r}"
                )
    tables: dict[str, Any] = {}
    for each in transforms:
        for name, array in each.tables.items():
            if not np.array_equal(tables.setdefault(name, array), array):
                raise ValueError(f"two transforms have a table {name!r}, and these differ")
    ranges = {name: bounds for each in transforms for name, bounds in each.ranges.items()}
    proxies = MappingProxyType(merged), MappingProxyType(ranges), MappingProxyType(tables)
    return init, observe, *proxies, all(each.keeps_top for each in transforms)
