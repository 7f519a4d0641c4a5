"""What a call asks for beside tokens: an entry for each kind of output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.api.arguments import Arguments
from jaxserve.api.logprobs import logprob_specs, raw_specs
from jaxserve.api.states import hidden_specs, layer_specs, logit_specs
from jaxserve.output.extras import ExtraSpec

if TYPE_CHECKING:
    from jaxserve.config import Limits
    from jaxserve.grammars.grammars import Grammars
    from jaxserve.options import Options
    from jaxserve.sampling_params import SamplingParams


class Asking(NamedTuple):
    """A call whose prompts and sampling parameters have been checked."""

    given: Arguments
    """As the caller gave them."""
    prompts: int
    """How many there are."""
    single: bool
    """One prompt, not a list of them."""
    samples: int
    """Of each prompt."""
    limits: Limits
    """What one request may ask for."""
    params: Sequence[SamplingParams]
    """Of each prompt."""
    options: Options
    """The engine's."""
    grammars: Grammars
    """Of the engine."""


KINDS: tuple[Callable[[Asking], Sequence[ExtraSpec | None] | None], ...] = (
    logprob_specs,
    hidden_specs,
    layer_specs,
    logit_specs,
    raw_specs,
)
"""Each gives a spec for each prompt (None: not of this one), or None where the call asks for
nothing of the kind. Raises InvalidRequestError, for a list naming the row."""


def extra_specs(asking: Asking) -> list[tuple[ExtraSpec, ...]]:
    """What each prompt's requests are to have, in the order of KINDS."""
    found = [specs for kind in KINDS if (specs := kind(asking)) is not None]
    if not found:
        return [()] * asking.prompts
    return [tuple(spec for spec in row if spec is not None) for row in zip(*found, strict=True)]
