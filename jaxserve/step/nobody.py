"""What steps are given in which nobody takes part, see `catalogue.Program.nobody`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.packing import pack

if TYPE_CHECKING:
    from jaxserve.step.programs import Facts


def no_rows(facts: Facts, rows: int) -> dict[str, Any]:
    """A decode step of `rows` rows."""
    batch = np.full((2, rows), facts.config.program.max_rows, np.int32)
    batch[1] = -1
    return {"rows": batch}


def no_tokens(facts: Facts, tokens: int) -> dict[str, Any]:
    """An extend step of `tokens` tokens."""
    return {"packed": pack.pack_nobody(facts.layout(tokens), facts.config.program.max_rows)}
