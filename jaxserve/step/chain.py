"""A user's transform, traced once for a model: what it computes, reads and remembers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import checks
from jaxserve.chains.spec import ParamSpec
from jaxserve.chains.use import Registered
from jaxserve.errors import InvalidRequestError
from jaxserve.step.traced import Tracing, given_tables
from jaxserve.transforms import Context, Transform

MOST_STATE_BYTES = 64 * 1024
"""Of one request's state: every slot has one."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a transform's arguments look like for a model."""

    vocab_size: int
    """V."""
    hidden_size: int
    """D."""
    dtype: jnp.dtype
    """Of hidden states."""
    num_layers: int
    """L."""
    layers: tuple[int, ...]
    """C inner layers that programs report, see `config.States`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A transform that can be compiled into programs."""

    kind: str
    """Of its programs: names what the functions compute and the tables hold."""
    transform: Transform
    """Checked, with its parameters' defaults."""
    spec: ParamSpec
    """Its parameters."""
    tables: dict[str, np.ndarray]
    """By name."""
    history: int
    """The most tokens that it asks of `Context.history`; 0: none."""
    reads_logprobs: bool
    """`observe` uses logprobs."""
    layers: bool
    """It reads inner layers."""
    head: bool
    """It asks the LM head about them."""
    state: Any
    """One row's, as a tree of jax.ShapeDtypeStruct."""

    @property
    def registered(self) -> Registered:
        """As the host knows it."""
        return Registered(self.kind, self.spec, self.history > 0, self.reads_logprobs)

    def params(self, floats: Any, ints: Any, tables: Mapping[str, Any]) -> dict[str, Any]:
        """What its functions know of one row's parameters [F] and [I]."""
        return {**self.spec.unpack(floats, ints), **tables}


def trace(
    name: str,
    transform: Any,
    params: Mapping[str, Any] | None,
    tables: Mapping[str, Any] | None,
    shapes: Shapes,
) -> Chain:
    """The arguments of `Engine.register`, checked. InvalidRequestError names the one that is wrong,
    and what a function raises while it is traced comes out as its cause."""
    if not isinstance(transform, Transform):
        raise InvalidRequestError(
            f"transform must be a jaxserve.transforms.Transform, got {checks.shown(transform)}"
        )
    arrays = given_tables(params, tables)
    arrays = {**given_tables(None, transform.tables), **arrays}
    spec = ParamSpec({**transform.params, **(params or {})}, transform.ranges)
    for both in spec.defaults.keys() & arrays:
        raise InvalidRequestError(f"params and tables of the transform {name!r} both have {both!r}")
    return _Tracing(name, transform, spec, arrays, shapes).chain()


class _Tracing:
    """The three functions with abstract arguments."""

    def __init__(
        self,
        name: str,
        transform: Transform,
        spec: ParamSpec,
        tables: dict[str, np.ndarray],
        shapes: Shapes,
    ) -> None:
        self._name, self._transform, self._spec = name, transform, spec
        self._tables, self._shapes = tables, shapes
        self._history, self._layers, self._head = 0, False, False
        self._tracing = Tracing(f"the transform {name!r}", tables)

    def chain(self) -> Chain:
        params = (
            jax.ShapeDtypeStruct((self._spec.floats,), jnp.float32),
            jax.ShapeDtypeStruct((self._spec.ints,), jnp.int32),
        )
        number, token = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        wanted = jax.ShapeDtypeStruct((self._shapes.vocab_size,), jnp.float32)
        _, state = self._tracing.made("init", self._init, *params, self._tables)
        self._check_state(state)
        _, logits = self._tracing.made("apply", self._apply, state, *params, *self._context)
        self._check_same("apply", "logits", logits, wanted)
        told = (state, *params, self._tables, token, number)
        observe, after = self._tracing.made("observe", self._observe, *told)
        self._check_same("observe", "the state", after, state)
        return Chain(
            f"sample_{self._tracing.digest}",
            self._transform,
            self._spec,
            self._tables,
            self._history,
            _reads_last(observe.jaxpr),
            self._layers,
            self._head,
            state,
        )

    @property
    def _context(self) -> tuple[Any, ...]:
        """Arguments of `_apply` behind the parameters."""
        shapes = self._shapes
        logits = jax.ShapeDtypeStruct((shapes.vocab_size,), jnp.float32)
        hidden = jax.ShapeDtypeStruct((shapes.hidden_size,), shapes.dtype)
        layers = jax.ShapeDtypeStruct((len(shapes.layers), shapes.hidden_size), shapes.dtype)
        numbers = (jax.ShapeDtypeStruct((), jnp.int32),) * 5
        return (self._tables, logits, logits, hidden, layers, *numbers)

    def _init(self, floats: Any, ints: Any, tables: Any) -> Any:
        return arrays_of(self._transform.init({**self._spec.unpack(floats, ints), **tables}))

    def _apply(
        self,
        state: Any,
        floats: Any,
        ints: Any,
        tables: Any,
        logits: Any,
        raw: Any,
        hidden: Any,
        layers: Any,
        *numbers: Any,
    ) -> Any:
        tracing, shapes = self, self._shapes

        class Inner(dict[int, jax.Array]):
            """Notices that it is read."""

            def __getitem__(self, index: int) -> jax.Array:
                tracing._layers = True
                return super().__getitem__(index)

        def head(state: jax.Array) -> jax.Array:
            self._head = True
            return jnp.zeros(shapes.vocab_size) + state.astype(jnp.float32).sum()

        def recent(count: int) -> tuple[jax.Array, jax.Array]:
            self._history = max(self._history, count)
            ids = jnp.arange(count, dtype=jnp.int32) + numbers[0]
            return ids, ids >= 0

        position, prompt_len, last_token, seed, sample_index = numbers
        context = Context(
            position,
            prompt_len,
            last_token,
            raw,
            hidden,
            seed,
            sample_index,
            recent,
            tables,
            Inner(zip(shapes.layers, layers, strict=True)),
            shapes.num_layers,
            head,
        )
        params = {**self._spec.unpack(floats, ints), **tables}
        return jnp.asarray(self._transform.apply(logits, state, params, context))

    def _observe(
        self, state: Any, floats: Any, ints: Any, tables: Any, token: Any, logprob: Any
    ) -> Any:
        params = {**self._spec.unpack(floats, ints), **tables}
        return arrays_of(self._transform.observe(state, params, token, logprob))

    def _check_state(self, state: Any) -> None:
        if not all(x.size for x in jax.tree.leaves(state)):
            raise InvalidRequestError(
                f"the state of the transform {self._name!r} has an array without elements"
            )
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        if size > MOST_STATE_BYTES:
            raise InvalidRequestError(
                f"the state of the transform {self._name!r} has {size} bytes a request, more than "
                f"{MOST_STATE_BYTES}"
            )

    def _check_same(self, what: str, of: str, found: Any, wanted: Any) -> None:
        def shown(tree: Any) -> str:
            return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree))

        if shown(found) != shown(wanted):
            raise InvalidRequestError(
                f"{what} of the transform {self._name!r} returns {of} as {shown(found)}, expected "
                f"{shown(wanted)}"
            )


def arrays_of(tree: Any) -> Any:
    """A state as arrays of their own dtypes: Python numbers would take the dtype of what they are
    combined with."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), tree)


def _reads_last(jaxpr: Any) -> bool:
    """Whether the last argument of a traced function is used."""
    last = jaxpr.invars[-1]
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    return id(last) in used or any(x is last for x in jaxpr.outvars)
