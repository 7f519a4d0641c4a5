"""The programs of an engine that reports hidden states or logits, beside those of every engine."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxserve.config.states import HIDDEN, LAYERS, LOGITS
from jaxserve.packing.wanted import NOTHING
from jaxserve.step import picking
from jaxserve.step.catalogue import Program, ProgramKey
from jaxserve.step.payloads import Variant

if TYPE_CHECKING:
    from jaxserve.step.programs import Facts


def beforehand(facts: Facts) -> list[Variant]:
    """Of the step programs that are compiled without anybody asking."""
    states = facts.config.states
    always = bool(states.names) and facts.config.program.deterministic
    plain = Variant.of(NOTHING, states, always)
    return list(dict.fromkeys((plain, Variant(states=states))))


def largest(facts: Facts) -> dict[ProgramKey, int]:
    """The programs that need most memory, and bytes of what is kept of one such step while the next
    one runs."""
    buckets, states = facts.config.buckets, facts.config.states
    rows, tokens = buckets.decode[-1], buckets.max_tokens
    inside = (1 + len(states.layers)) * facts.model.hidden_size * facts.dtype.itemsize
    of_row = inside + (4 * facts.model.vocab_size if states.logits else 0)
    found = {}
    for variant in beforehand(facts):
        reports = bool(variant.states.names)
        # of prompts, what is gathered is another array
        found["extend" + variant.ending, tokens] = reports * 2 * tokens * inside
        for kind, steps in facts.decode_kinds.items():
            found[kind + variant.ending, rows] = reports * steps * rows * of_row
    return found


def picking_programs(facts: Facts, extend: Program, *decodes: Program) -> list[Program]:
    """Gathers of the rows of what those step programs report, see step.picking. A step's bucket can
    be used when they are there, too."""
    states, buckets, hidden = facts.config.states, facts.config.buckets, facts.model.hidden_size
    shapes = {
        HIDDEN: ((hidden,), facts.dtype),
        LAYERS: ((len(states.layers), hidden), facts.dtype),
        LOGITS: ((facts.model.vocab_size,), jnp.float32),
    }

    def programs(
        name: str, source: str, steps: Program, lead: Mapping[int, tuple[int, ...]]
    ) -> list[Program]:
        """lead: by bucket of `steps`, the dimensions of their results that count rows."""
        shape, dtype = shapes[name]
        return [
            Program(
                picking.kind(name, source, size),
                lambda bucket: functools.partial(picking.gather, len(lead[bucket])),
                {
                    "source": lambda bucket: facts.array(*lead[bucket], *shape, dtype=dtype),
                    "rows": facts.array(size),
                },
                buckets=tuple(b for b in steps.buckets if size < math.prod(lead[b])),
                first=steps.first,
                ladder=steps.ladder,
            )
            for size in picking.sizes_below(max(map(math.prod, lead.values())))
        ]

    found = []
    for name in states.names:
        for steps, (source, count) in zip(decodes, facts.decode_kinds.items(), strict=True):
            found += programs(name, source, steps, {b: (count, b) for b in buckets.decode})
        rows = {tokens: (1, buckets.extend_rows(tokens)) for tokens in buckets.extend}
        found += programs(name, "extend", extend, rows)
        if name != LOGITS and states.hidden == "full":
            found += programs(name, "prompt", extend, {t: (t,) for t in buckets.extend})
    return found
