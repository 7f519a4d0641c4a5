"""Logprobs of tokens, as a request's extra: what is asked for, read, and told. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError
from jaxserve.output.extras import Collected, Extra, ExtraSpec, View

TopLogprobs = list[tuple[float, int]] | None
"""One position's (logprob, token id) pairs, best first; None where no predecessor exists."""
LogprobTuple = tuple[float | None, int | None, str | None]


@dataclasses.dataclass(frozen=True)
class LogprobSpec(ExtraSpec):
    """What logprobs a request wants."""

    start: int = -1
    """First prompt position whose logprob is reported; -1 is output tokens only."""
    top: int = 0
    """How many of the best tokens are reported at each position."""
    ids: tuple[int, ...] = ()
    """Token ids whose logprobs are reported at each position."""
    wide: bool = False
    """More of one of them than the usual programs have columns for, see `config.WIDE_TOP`."""

    def check(self, prompt_len: int) -> None:
        if self.start > prompt_len:
            raise InvalidRequestError(
                f"logprob_start_len must not exceed the prompt's {prompt_len} tokens, got "
                f"{checks.shown(self.start)}"
            )

    def extra(self, prompt_len: int) -> LogprobExtra:
        return LogprobExtra(self, prompt_len)


@dataclasses.dataclass(slots=True)
class Logprobs:
    """Logprobs of consecutive positions. The three lists are empty when not asked for,
    otherwise as long as `token`. None stands where there is no predecessor to predict from."""

    token: list[float | None] = dataclasses.field(default_factory=list)
    top: list[TopLogprobs] = dataclasses.field(default_factory=list)
    ids: list[TopLogprobs] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token)

    def extend(self, other: Logprobs, /) -> None:
        self.token += other.token
        self.top += other.top
        self.ids += other.ids

    def clear(self) -> None:
        self.token.clear()
        self.top.clear()
        self.ids.clear()


class Columns(NamedTuple):
    """The parts of a step's packed logprobs, by row."""

    chosen: np.ndarray
    """[B] float32: of the token itself."""
    top_values: np.ndarray
    """[B, C] float32: of the best tokens."""
    top_ids: np.ndarray
    """[B, C] int32."""
    named: np.ndarray
    """[B, I] float32: of the ids that the row's request named."""

    @classmethod
    def of(cls, packed: np.ndarray) -> Columns:
        """Views into `packed` [B, 2 + C + I + C] int32: in each row C, the bits of the floats, then
        the ids (sampler.logprobs.TokenLogprobs.pack). Rows that no prompt wanted may be 0."""
        top = int(packed[0, 0] or packed[:, 0].max())
        ids_from = packed.shape[1] - top
        floats = packed[:, 1:ids_from].view(np.float32)
        return cls(floats[:, 0], floats[:, 1 : 1 + top], packed[:, ids_from:], floats[:, 1 + top :])


class LogprobExtra(Extra[Logprobs]):
    """The logprobs of one request. A row's are of the token behind it, so that those of prompt
    position p are read from the row of p - 1."""

    name = "logprobs"

    def __init__(self, spec: LogprobSpec, prompt_len: int) -> None:
        last = prompt_len - 1
        super().__init__(range(spec.start, last) if 0 <= spec.start < last else range(0))
        self.spec = spec
        self.fields = {"wants_logprob": 1, "num_top": spec.top, "num_named": len(spec.ids)}
        self.ids = spec.ids
        self.wide = spec.wide
        self._has_prompt = 0 <= spec.start < prompt_len  # whether the prompt has entries at all

    def empty(self) -> Logprobs:
        return Logprobs()

    @staticmethod
    def open(array: np.ndarray) -> Columns:
        return Columns.of(array)

    def values(self, opened: Columns, start: int, count: int) -> Logprobs:
        """As much as the request asked for."""
        spec, stop = self.spec, start + count
        found = Logprobs(opened.chosen[start:stop].tolist())
        if spec.top:
            values = opened.top_values[start:stop, : spec.top].tolist()
            ids = opened.top_ids[start:stop, : spec.top].tolist()
            found.top = [list(zip(*row, strict=True)) for row in zip(values, ids, strict=True)]
        if spec.ids:
            named = opened.named[start:stop, : len(spec.ids)].tolist()
            found.ids = [list(zip(row, spec.ids, strict=True)) for row in named]
        return found

    def whole(self, values: Logprobs) -> Logprobs:
        """The first entry has no predecessor, whatever the start (docs/guide/sampling.md)."""
        if not self._has_prompt:
            return Logprobs()
        none: list[TopLogprobs] = [None]
        whole = Logprobs([None], none if self.spec.top else [], list(none) if self.spec.ids else [])
        whole.extend(values)
        return whole

    def as_meta(self, collected: Collected, first: int, view: View) -> dict[str, Any]:
        """The logprob keys, those of the prompt in each chunk."""
        out: Logprobs = collected.output
        given: Logprobs = collected.prompt or Logprobs()
        prompt = view.prompt_ids[len(view.prompt_ids) - len(given) :]
        output = view.output_ids[first : len(out)]
        entries: dict[str, Any] = {
            "input_token_logprobs": tuples(zip(given.token, prompt, strict=True), view),
            "output_token_logprobs": tuples(zip(out.token[first:], output, strict=True), view),
            "output_token_logprobs_length": len(out) - first,
        }
        if self.spec.top:
            entries["input_top_logprobs"] = _positions(given.top, view)
            entries["output_top_logprobs"] = _positions(out.top[first:], view)
        if self.spec.ids:
            entries["input_token_ids_logprobs"] = _positions(given.ids, view)
            entries["output_token_ids_logprobs"] = _positions(out.ids[first:], view)
        return entries


def _positions(positions: Iterable[TopLogprobs], view: View) -> list[list[LogprobTuple] | None]:
    return [None if pairs is None else tuples(pairs, view) for pairs in positions]


def tuples(pairs: Iterable[tuple[float | None, int]], view: View) -> list[LogprobTuple]:
    """As results tell them: with the token's text, where the call wants that."""
    text = view.text
    if text is None:
        return [(logprob, token, None) for logprob, token in pairs]
    return [(logprob, token, text(token)) for logprob, token in pairs]
