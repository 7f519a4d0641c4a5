"""Hidden states and logits, as a request's extras. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxserve.config.states import HIDDEN, LAYERS, LOGITS
from jaxserve.output.extras import Collected, Extra, ExtraSpec, News, View
from jaxserve.output.picked import HostRows

Blocks = list[np.ndarray]
"""Rows [k, ...] of consecutive tokens as a step had them, views of what was copied."""


@dataclasses.dataclass(frozen=True)
class StateSpec(ExtraSpec):
    """Hidden states of one request, or its logits."""

    kind: type[StateExtra]
    """Which of them."""
    last: bool
    """Of the last position alone."""
    width: int
    """Numbers of a position."""
    layers: tuple[int, ...] = ()
    """Of `layer_hidden_states`, in the order of the array."""

    def extra(self, prompt_len: int) -> StateExtra:
        return self.kind(self, prompt_len)

    def num_bytes(self, prompt_len: int, new_tokens: int) -> int:
        positions = 1 if self.last else max(new_tokens, 1)
        if self.kind.of_prompt and not self.last:
            positions += prompt_len - 1  # from the last of them the first token is drawn
        return positions * self.width * np.dtype(np.float32).itemsize


class StateExtra(Extra[Blocks]):
    """One value for each position from which a token was drawn, and where a kind has them the
    positions before: those of the prompt are the first of its values, [P, ...]."""

    picked = True
    of_prompt = True
    """Whether the prompt's positions have values."""

    def __init__(self, spec: StateSpec, prompt_len: int) -> None:
        whole = self.of_prompt and not spec.last
        super().__init__(range(prompt_len if whole else 0))
        self.spec = spec
        self.at_end = spec.last
        self.bulky = not spec.last
        self._prompt_len = prompt_len
        self._known = 1 if whole else 0  # outputs whose values are among the prompt's

    def empty(self) -> Blocks:
        return []

    def values(self, opened: HostRows, start: int, count: int) -> Blocks:
        return opened.blocks(start, count)

    def reads_sample(self, stop: int) -> bool:
        return not self.at_end and (not self.prompt or stop > self._prompt_len)

    def read(self, reported: Any, row: int) -> None:
        if self._known:
            self._known -= 1
        else:
            super().read(reported, row)

    def collect(self) -> Collected:
        return Arrays()

    def as_meta(self, collected: Collected, first: int, view: View) -> dict[str, Any]:
        rows: list[np.ndarray] = collected.output
        if self.spec.last:
            return self.entries(rows[-1] if rows else None)
        if not self.prompt:
            return self.entries(rows[first:])
        if first:
            return self.entries(rows[first - 1 :])
        prompt = () if collected.prompt is None else (collected.prompt,)
        return self.entries([*prompt, *rows])

    def entries(self, found: list[np.ndarray] | np.ndarray | None) -> dict[str, Any]:
        """Of meta_info."""
        return {self.name: found}


class HiddenStates(StateExtra):
    """[D] of each position: the LM head's input."""

    name = HIDDEN


class LayerHiddenStates(StateExtra):
    """[C, D] of each position; told by layer, [D]."""

    name = LAYERS

    def entries(self, found: list[np.ndarray] | np.ndarray | None) -> dict[str, Any]:
        return {self.name: {x: _of(found, i) for i, x in enumerate(self.spec.layers)}}


class Logits(StateExtra):
    """[V] of each output: the model's own, before temperature, penalties and biases."""

    name = LOGITS
    of_prompt = False


class Arrays(Collected):
    """Arrays of the caller's own, float32: converted on the caller's thread, each once."""

    def __init__(self) -> None:
        super().__init__([])

    def add(self, news: News) -> None:
        if news.output:
            self.output += list(float32(news.output))
        if news.prompt is not None:
            self.prompt = float32(news.prompt) if news.prompt else None


def float32(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """[sum of k, ...] of blocks [k, ...] of any float, copied."""
    shape = blocks[0].shape[1:]
    found = np.empty((sum(map(len, blocks)), *shape), np.float32)
    at = 0
    for block in blocks:
        found[at : at + len(block)] = block
        at += len(block)
    return found


def _of(found: Iterable[np.ndarray] | np.ndarray | None, index: int) -> Any:
    """Of one layer: its part of each array [..., C, D]."""
    if found is None:
        return None
    if isinstance(found, np.ndarray):
        return found[..., index, :]
    return [each[..., index, :] for each in found]
