"""What a hook may know of a token beside its vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class HookContext:
    """One token, while the model runs it. All values are traced."""

    position: jax.Array
    """int32: the token's place; the prompt's first token has 0."""
    tables: Mapping[str, Any]
    """Arrays that the hook was registered with, by name: the same for all tokens."""
