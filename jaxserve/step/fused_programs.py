"""The programs of a chain that is fused into the decode step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxserve.step.catalogue import Program
from jaxserve.step.chain import Chain
from jaxserve.step.chain_programs import (
    ChainBuckets,
    abstract_state,
    abstract_tables,
    chain_arrays,
    chain_model,
    token_pages,
)
from jaxserve.step.fused import decode_fused
from jaxserve.step.nobody import no_rows
from jaxserve.step.payloads import Variant
from jaxserve.step.programs import Facts
from jaxserve.step.state_programs import beforehand


def fused_kind(kind: str, chain: str) -> str:
    """Of a decode program of `kind` that draws with the chain of kind `chain`."""
    return f"{kind}_{chain}"


def fused_programs(facts: Facts, chain: Chain) -> list[Program]:
    """Decode steps of rows with `chain` and of rows without: what `decode_kinds` there are."""
    usual, names = beforehand(facts), chain_arrays(chain)
    kept = {
        names.state: abstract_state(facts, chain),
        names.tables: abstract_tables(facts, chain),
    }
    rows = ChainBuckets.of(facts.config.buckets).decode[::-1]
    history = {"token_pages": token_pages(facts)} if chain.history else {}

    def decode(variant: Variant, steps: int) -> Callable[[int], Callable[..., Any]]:
        model = facts.step_model(variant)
        if chain.layers:
            model = dataclasses.replace(model, layers=facts.config.states.layers)
        return lambda rows: functools.partial(decode_fused, chain_model(facts, chain), model, steps)

    def nobody(rows: int) -> dict[str, Any]:
        given = no_rows(facts, rows)
        return {**given, "chained": given["rows"][0]}

    return [
        Program(
            fused_kind(kind, chain.kind) + variant.ending,
            decode(variant, steps),
            {
                **facts.state(variant.wide),
                **kept,
                "rows": lambda rows: facts.array(2, rows),
                "chained": facts.array,
                "comm": facts.comm,
                **history,
            },
            donated=("cache", "progress", "sampled", names.state, *history),
            buckets=rows if variant in usual else (),
            choices=lambda rows: facts.choices(rows, rows),
            mosaic=facts.decodes_with_mosaic,
            nobody=nobody,
        )
        for variant in Variant.all(facts.config.states)
        for kind, steps in facts.decode_kinds.items()
    ]
