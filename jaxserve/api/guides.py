"""What a call asks to decide about its tokens on the host: an entry for each kind of guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxserve.api.extras import Asking
from jaxserve.api.grammars import grammar_specs
from jaxserve.api.processors import processor_specs
from jaxserve.guides.guide import GuideSpec

KINDS: tuple[Callable[[Asking], Sequence[GuideSpec | None] | None], ...] = (
    grammar_specs,
    processor_specs,
)
"""As `api.extras.KINDS`. A request's guides are asked in this order; a grammar's overwrites what
others have said of its mask."""


def guide_specs(asking: Asking) -> list[tuple[GuideSpec, ...]]:
    """What is to guide each prompt's requests."""
    found = [specs for kind in KINDS if (specs := kind(asking)) is not None]
    if not found:
        return [()] * asking.prompts
    return [tuple(spec for spec in row if spec is not None) for row in zip(*found, strict=True)]
