"""What steps report beside tokens: an entry for each payload.

A usual one is computed in every step, the others by programs of their own, of the steps with a
request that wants them. `output.extras` reads them on the host; docs/add_an_output.md adds one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxserve.packing.wanted import Wanted
from jaxserve.sampler.logprobs import prompt_logprobs
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
    sampled: Callable[[Drawn], jax.Array]
    """[B, ...], by row."""
    prompt: Callable[[PromptRows], jax.Array] | None = None
    """[N, ...], by packed token; None: it says nothing of prompts."""
    usual: bool = False
    """All step programs report it."""


PAYLOADS = (Payload("logprobs", lambda drawn: drawn.logprobs, prompt_logprobs, usual=True),)


class Variant(NamedTuple):
    """What the programs of a step report."""

    names: tuple[str, ...] = ()
    """Of payloads that are not usual."""
    wide: bool = False
    """With the columns of `config.WIDE_TOP`."""

    @classmethod
    def of(cls, wanted: Wanted) -> Variant:
        """The programs for a batch."""
        if not wanted.names:
            return USUAL
        names = (each.name for each in PAYLOADS if each.name in wanted.names and not each.usual)
        return cls(tuple(names), wanted.wide)

    @classmethod
    def all(cls) -> list[Variant]:
        """USUAL first."""
        rare = [each.name for each in PAYLOADS if not each.usual]
        sets = (names for n in range(len(rare) + 1) for names in itertools.combinations(rare, n))
        return [cls(names, wide) for names in sets for wide in (False, True)]

    @property
    def ending(self) -> str:
        """Of the kinds of its programs: "decode" and this."""
        return "".join([f"_{name}" for name in self.names]) + ("_wide" if self.wide else "")

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """The payloads that its programs report."""
        return tuple(each for each in PAYLOADS if each.usual or each.name in self.names)


USUAL = Variant()
