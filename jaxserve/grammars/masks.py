"""Masks of several matchers at once, on threads of llguidance's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

MOST_THREADS = 16


class Masks:
    """One object for an engine, any thread."""

    def __init__(self, words: int) -> None:
        """words: int32 numbers of a mask."""
        from llguidance import LLExecutor

        self._words = words
        self._executor = LLExecutor(min(max(os.cpu_count() or 1, 2), MOST_THREADS))

    def fill(self, matchers: Sequence[LLMatcher]) -> np.ndarray:
        """[len(matchers), words] int32. What goes wrong is each matcher's `get_error`."""
        filled = np.empty((len(matchers), self._words), np.int32)
        numbered = [(matcher, number) for number, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(
            numbered, filled.ctypes.data, filled.strides[0], len(matchers)
        )
        return filled
