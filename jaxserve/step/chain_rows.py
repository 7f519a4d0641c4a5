"""The rows of a chain within a step: what its functions are told, and what they make of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampler.logprobs import chosen_logprobs
from jaxserve.sampler.state import RowParams
from jaxserve.step.chain import Chain, arrays_of
from jaxserve.step.decode import Seen
from jaxserve.transforms import Context

if TYPE_CHECKING:
    from jaxserve.models.decoder import Decoder


class ChainState(NamedTuple):
    """What a chain keeps for every slot, donated."""

    state: Any
    """A tree of arrays [R+1, ...]."""
    floats: Any
    """[R+1, F] float32: parameters."""
    ints: Any
    """[R+1, I] int32."""

    @classmethod
    def empty(cls, chain: Chain, rows: int) -> ChainState:
        """Of `rows` = R + 1 slots, on the host."""
        return cls(
            jax.tree.map(lambda x: np.zeros((rows, *x.shape), x.dtype), chain.state),
            np.zeros((rows, chain.spec.floats), np.float32),
            np.zeros((rows, chain.spec.ints), np.int32),
        )


class Kept(NamedTuple):
    """What goes on from step to step."""

    own: ChainState
    token_pages: jax.Array | None
    """[P, S] int32: the tokens beside their keys and values; None: the chain reads no history."""

    @property
    def updated(self) -> tuple[Any, ...]:
        """What programs of the chain give back of it, in the order of their donated arguments."""
        return (self.own,) if self.token_pages is None else tuple(self)


@dataclasses.dataclass(frozen=True)
class ChainModel:
    """A chain as programs see it."""

    chain: Chain
    num_layers: int
    """L, of the model."""
    layers: tuple[int, ...]
    """Of `Seen.layers`."""


class ChainRows:
    """One step's B rows. Those that have the chain are told apart by their slots: of others `apply`
    and `after` make something that nobody reads."""

    def __init__(
        self,
        of: ChainModel,
        module: Decoder | None,
        tables: Mapping[str, jax.Array],
        kept: Kept,
        slots: jax.Array,
        page_table: jax.Array,
        positions: jax.Array,
        row_params: RowParams,
        seen: Seen,
    ) -> None:
        """module: None where the chain does not ask the LM head. slots [B] int32: R for rows of no
        chain. page_table [B, W], positions [B] int32: of the tokens drawn now, 0 of padding."""
        self._of, self._module, self._tables = of, module, tables
        self._own, self._token_pages = kept.own, kept.token_pages
        if self._token_pages is not None:
            self._token_pages = _noted(self._token_pages, page_table, positions - 1, seen.tokens)
        self._slots = slots
        self._rows = jax.tree.map(lambda x: x[slots], tuple(kept.own))
        columns = row_params.columns(slots)
        numbers = [columns[name] for name in ("prompt_len", "seed", "sample_index")]
        self._facts = (page_table, positions, seen, *numbers)

    def apply(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] as the chain leaves them."""
        state, floats, ints = self._rows
        return jax.vmap(self._of_row)(logits, state, floats, ints, self._facts)

    def after(self, tokens: jax.Array, logprobs: jax.Array) -> Kept:
        """When tokens [B] have been drawn, with packed logprobs."""
        chain, (state, floats, ints) = self._of.chain, self._rows

        def observe(own: Any, floats: Any, ints: Any, token: jax.Array, logprob: jax.Array) -> Any:
            params = chain.params(floats, ints, self._tables)
            return arrays_of(chain.transform.observe(own, params, token, logprob))

        after = jax.vmap(observe)(state, floats, ints, tokens, chosen_logprobs(logprobs))
        written = jax.tree.map(lambda x, new: x.at[self._slots].set(new), self._own.state, after)
        return Kept(self._own._replace(state=written), self._token_pages)

    def _of_row(self, logits: jax.Array, own: Any, floats: Any, ints: Any, facts: Any) -> jax.Array:
        chain = self._of.chain
        pages, position, seen, prompt_len, seed, sample_index = facts
        inner = {} if seen.layers is None else zip(self._of.layers, seen.layers, strict=True)
        context = Context(
            position,
            prompt_len,
            seen.tokens,
            seen.logits,
            seen.hidden,
            seed,
            sample_index,
            functools.partial(_recent, self._token_pages, pages, position),
            self._tables,
            dict(inner),
            self._of.num_layers,
            self._head,
        )
        params = chain.params(floats, ints, self._tables)
        return chain.transform.apply(logits, own, params, context)

    def _head(self, state: jax.Array) -> jax.Array:
        assert self._module is not None, "found out when the chain was traced"
        return self._module.logits(self._module.final_norm(state[None]))[0]


def _noted(
    token_pages: jax.Array, table: jax.Array, positions: jax.Array, tokens: jax.Array
) -> jax.Array:
    """With each row's last token [B] at its position [B]; rows of padding have -1."""
    size = token_pages.shape[1]
    own = jnp.take_along_axis(table, jnp.maximum(positions, 0)[:, None] // size, axis=1)[:, 0]
    pages = jnp.where(positions >= 0, own, token_pages.shape[0])
    return token_pages.at[pages, positions % size].set(tokens, mode="drop")


def _recent(
    token_pages: jax.Array | None, pages: jax.Array, position: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """See `Context.history`. pages [W]: of the row."""
    assert token_pages is not None, "found out when the chain was traced"
    size = token_pages.shape[1]
    at = position - count + jnp.arange(count, dtype=jnp.int32)
    there = at >= 0
    at = jnp.maximum(at, 0)
    return jnp.where(there, token_pages[pages[at // size], at % size], 0), there
