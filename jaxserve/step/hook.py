"""A user's functions at points of the model, traced once: what they compute and read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import checks
from jaxserve.chains.spec import ParamSpec
from jaxserve.chains.use import Registered
from jaxserve.errors import InvalidRequestError
from jaxserve.hooks import HookContext
from jaxserve.hooks.points import check_point
from jaxserve.models.config import ModelConfig
from jaxserve.step.traced import Tracing, given_tables

Function = Callable[[jax.Array, Mapping[str, Any], HookContext], jax.Array]
"""(x [D], params, context) -> x [D] of one token; of heads [N * H]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Hook:
    """What can be compiled into a model."""

    kind: str
    """Names what the functions compute, and where, and what the tables hold."""
    points: dict[str, Function]
    """By the point's name."""
    spec: ParamSpec
    """Parameters of a request."""
    tables: dict[str, np.ndarray]
    """By name."""

    @property
    def registered(self) -> Registered:
        """As the host knows it."""
        return Registered(self.kind, self.spec, reads_history=False, reads_logprobs=False)

    def apply(
        self, point: str, x: jax.Array, floats: Any, ints: Any, position: Any, tables: Any
    ) -> jax.Array:
        """The function of `point` on one token's x [D]."""
        context = HookContext(position, tables)
        found = self.points[point](x, self.spec.unpack(floats, ints), context)
        return jnp.asarray(found).astype(x.dtype)


def trace_hook(
    name: str,
    points: Any,
    params: Mapping[str, Any] | None,
    tables: Mapping[str, Any] | None,
    model: ModelConfig,
    dtype: jnp.dtype,
) -> Hook:
    """The arguments of `Engine.register_hook`, checked, for a model whose activations are `dtype`.
    InvalidRequestError names the one that is wrong, and its cause is what a function has raised."""
    if not isinstance(points, Mapping) or not points:
        raise InvalidRequestError(
            f"points must be a dict of functions by point, got {checks.shown(points)}"
        )
    arrays = given_tables(params, tables)
    functions = {check_point(point, model.num_layers): value for point, value in points.items()}
    spec = ParamSpec(params or {})
    draft, tracing = Hook("", functions, spec, arrays), Tracing(f"the hook {name!r}", arrays)
    arguments = (
        jax.ShapeDtypeStruct((spec.floats,), jnp.float32),
        jax.ShapeDtypeStruct((spec.ints,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        arrays,
    )
    for point, function in functions.items():
        if not callable(function):
            raise InvalidRequestError(
                f"points[{point!r}] must be a function, got {checks.shown(function)}"
            )
        width = model.num_heads * model.head_dim if point.endswith(".heads") else model.hidden_size
        x = jax.ShapeDtypeStruct((width,), dtype)
        _, result = tracing.made(point, functools.partial(draft.apply, point), x, *arguments)
        if result.shape != x.shape:
            raise InvalidRequestError(
                f"{point} of the hook {name!r} returns {list(result.shape)}, expected [{width}], "
                "one token's"
            )
    return dataclasses.replace(draft, kind=f"hook_{tracing.digest}")
