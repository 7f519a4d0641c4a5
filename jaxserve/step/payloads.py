"""What steps report beside tokens: an entry for each payload.

A usual one is computed in every step, the others by programs of their own, of the steps with a
request that wants them. `output.extras` reads them on the host; docs/add_an_output.md adds one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxserve.config.states import HIDDEN, LAYERS, LOGITS, NO_STATES, STATE_NAMES, States
from jaxserve.packing.wanted import Wanted
from jaxserve.sampler.logprobs import prompt_logprobs, raw_logprobs
from jaxserve.sampler.state import RowParams, SparseRows


class Drawn(NamedTuple):
    """What a step knows of the tokens that it has drawn, one for each of B rows."""

    hidden: jax.Array
    """[B, D], from which the logits follow."""
    logits: jax.Array
    """[B, V] float32, as the model has them: before temperature, penalties and biases."""
    tokens: jax.Array
    """[B] int32."""
    logprobs: jax.Array
    """[B, X] int32: packed, see sampler.logprobs; of the rows that want them."""
    layers: jax.Array | None = None
    """[B, C, D]: hidden states of the inner layers that the programs report."""


class PromptRows(NamedTuple):
    """N of the tokens that an extend step has run, at temperature 1 whatever their requests say.
    Those that are not `wanted` may get any values."""

    hidden: jax.Array
    """[N, D]."""
    logits: jax.Array
    """[N, V] float32."""
    successors: jax.Array
    """[N] int32: the tokens that follow; 0 where that is unknown."""
    slots: jax.Array
    """[N] int32, of `row_params` and `sparse`."""
    wanted: jax.Array
    """[N] bool: tokens of prompts that an extra reads."""
    row_params: RowParams
    sparse: SparseRows
    top: int
    """C, columns of the best logprobs."""


@dataclasses.dataclass(frozen=True)
class Payload:
    """One array of a step's results."""

    name: str
    """As `Extra.name` has it."""
    sampled: Callable[[Drawn], Any]
    """[B, ...], by row."""
    prompt: Callable[[PromptRows], jax.Array] | None = None
    """[N, ...], by packed token; None: it says nothing of prompts."""
    usual: bool = False
    """All step programs report it."""


PAYLOADS = (
    Payload("logprobs", lambda drawn: drawn.logprobs, prompt_logprobs, usual=True),
    Payload("raw_logprobs", lambda drawn: raw_logprobs(drawn.logits, drawn.tokens)),
)

STATES: Mapping[str, Callable[[Drawn], jax.Array | None]] = {
    HIDDEN: lambda drawn: drawn.hidden,
    LAYERS: lambda drawn: drawn.layers,
    LOGITS: lambda drawn: drawn.logits,
}
"""Payloads that an engine has where `config.States` names them, all of them in one set of
programs. Of them rows are copied that somebody asked for, see step.picking."""


class Variant(NamedTuple):
    """What the programs of a step report."""

    names: tuple[str, ...] = ()
    """Of payloads that are not usual."""
    wide: bool = False
    """With the columns of `config.WIDE_TOP`."""
    states: States = NO_STATES
    """Of the model's inside."""

    @classmethod
    def of(cls, wanted: Wanted, states: States = NO_STATES, always: bool = False) -> Variant:
        """The programs for a batch in an engine with `states`. always: they report them, so that
        no row's numbers depend on what others ask for."""
        if not (wanted.names or always):
            return USUAL
        names = (each.name for each in PAYLOADS if each.name in wanted.names and not each.usual)
        inside = states if always or not wanted.names.isdisjoint(STATE_NAMES) else NO_STATES
        return cls(tuple(names), wanted.wide, inside)

    @classmethod
    def all(cls, states: States = NO_STATES) -> list[Variant]:
        """Of an engine with `states`. USUAL first."""
        rare = [each.name for each in PAYLOADS if not each.usual]
        sets = [names for n in range(len(rare) + 1) for names in itertools.combinations(rare, n)]
        inside = dict.fromkeys((NO_STATES, states))
        return [cls(*each) for each in itertools.product(sets, (False, True), inside)]

    @property
    def ending(self) -> str:
        """Of the kinds of its programs: "decode" and this."""
        names = "".join([f"_{name}" for name in self.names])
        return names + self.states.ending + ("_wide" if self.wide else "")

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """The payloads that its programs report."""
        found = (each for each in PAYLOADS if each.usual or each.name in self.names)
        return (*found, *(Payload(name, STATES[name]) for name in self.states.names))


USUAL = Variant()
