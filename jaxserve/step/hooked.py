"""The model with hooks in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import PagedOps
from jaxserve.hooks.points import added, heads, written
from jaxserve.models.ops import AttentionSpec, Residual
from jaxserve.step.hook import Hook


class HookState(NamedTuple):
    """What the device keeps for a hook."""

    floats: Any
    """[R+1, F] float32: parameters by slot."""
    ints: Any
    """[R+1, I] int32."""
    tables: Mapping[str, Any]
    """By name."""


class Tokens(NamedTuple):
    """Whose the T tokens of a step are."""

    hook: jax.Array
    """[T] int32: the number of the hook that the request has, 0 for none."""
    slots: jax.Array
    """[T] int32."""
    positions: jax.Array
    """[T] int32."""


class Taps:
    """Hooks 1, 2, ... at the points of a model that is traced: each changes the tokens of requests
    that have it, and leaves the others as they are."""

    def __init__(self, hooks: Sequence[Hook], states: Sequence[HookState], tokens: Tokens) -> None:
        self._hooks = list(zip(hooks, states, strict=True))
        self._tokens = tokens

    def at(self, point: str) -> bool:
        """Whether any hook is at `point`."""
        return any(point in hook.points for hook, _ in self._hooks)

    def touch(self, point: str, x: jax.Array) -> jax.Array:
        """x [T, D] as it leaves `point`, or of heads [T, N * H]."""
        owner, slots, positions = self._tokens
        for number, (hook, state) in enumerate(self._hooks, 1):
            if point not in hook.points:
                continue

            of_token = functools.partial(hook.apply, point)
            axes = (0, 0, 0, 0, None)
            params = state.floats[slots], state.ints[slots]
            new = jax.vmap(of_token, axes)(x, *params, positions, state.tables)
            x = jnp.where((owner == number)[:, None], new, x)
        return x


class TappedOps:
    """`models.ops.Ops` of an engine, with hooks behind what is written to the residual stream,
    before the sum, and behind attention. At points without any it traces to what `ops` does."""

    def __init__(self, ops: PagedOps, taps: Taps) -> None:
        self._ops = ops
        self._taps = taps
        self._writes = 0
        self.linear_in, self.norm, self.total = ops.linear_in, ops.norm, ops.total

    def attend(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        meta: Any,
        spec: AttentionSpec,
        **norms: Any,
    ) -> tuple[jax.Array, Any]:
        """See `Ops.attend`."""
        found, cache = self._ops.attend(qkv, cos, sin, cache, meta, spec, **norms)
        point = heads(spec.layer)
        if self._taps.at(point):
            found = self._ops.own_heads(self._taps.touch(point, self._ops.all_heads(found)))
        return found, cache

    def linear_out(
        self, y: jax.Array, kernel: jax.Array, stream: Residual, **options: Any
    ) -> Residual:
        """See `Ops.linear_out`."""
        point, before = written(self._writes), added(self._writes)
        self._writes += 1
        if self._taps.at(before):
            alone = Residual(jnp.zeros_like(stream.x))
            change = self._ops.total(self._ops.linear_out(y, kernel, alone, **options))
            found = Residual(stream.x + self._taps.touch(before, change), stream.pending)
        else:
            found = self._ops.linear_out(y, kernel, stream, **options)
        if not self._taps.at(point):
            return found
        return Residual(self._taps.touch(point, self._ops.total(found)))


def admit_hook(
    state: HookState, slot: jax.Array, floats: jax.Array, ints: jax.Array
) -> tuple[tuple[HookState], tuple[()]]:
    """A slot's parameters [F], [I]."""
    kept = state._replace(
        floats=state.floats.at[slot].set(floats), ints=state.ints.at[slot].set(ints)
    )
    return (kept,), ()
