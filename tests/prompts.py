"""Random prompts, and what comes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any


def text(seed: int, length: int) -> list[int]:
    """Token ids that every tiny checkpoint knows, none of them special."""
    random_ = random.Random(seed)
    return [random_.randrange(4, 500) for _ in range(length)]


def ids(results: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """The output of each."""
    return [result["output_ids"] for result in results]
