"""What a call asks for of grammars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.api.extras import Asking
from jaxserve.api.prompts import NamingRow
from jaxserve.grammars.guide import GrammarSpec
from jaxserve.sampling_params import GRAMMAR_KEYS, SamplingParams


def grammar_specs(asking: Asking) -> list[GrammarSpec | None] | None:
    """The grammar of each prompt, compiled; they are compiled side by side. Raises as
    `grammars.Grammars`, for a list naming the row."""
    rows = [params.grammar for params in asking.params]
    if not any(rows):
        return None
    grammars, begun = asking.grammars, []
    for index, grammar in enumerate(rows):
        if grammar is not None:
            with NamingRow(index, not asking.single):
                begun.append((index, grammar, grammars.ask(grammar)))
    specs: list[GrammarSpec | None] = [None] * len(rows)
    for index, grammar, future in begun:
        with NamingRow(index, not asking.single):
            specs[index] = grammars.spec(grammar, future)
    return specs


def may_wait(sampling_params: Any, preferred: Mapping[str, Any] | None) -> bool:
    """Whether a call with these parameters, not checked yet, asks for a grammar, which may have to
    be compiled. preferred: the engine's."""
    rows = sampling_params if isinstance(sampling_params, list | tuple) else [sampling_params]
    return any(map(_asks, rows)) or _asks(preferred)


def _asks(params: Any) -> bool:
    if isinstance(params, SamplingParams):
        return params.grammar is not None
    return isinstance(params, Mapping) and any(params.get(name) for name in GRAMMAR_KEYS)
