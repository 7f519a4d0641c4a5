"""The guide of a request with a grammar."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.errors import RequestFailedError
from jaxserve.grammars.compiler import SLOWEST_MASK, said
from jaxserve.guides.guide import Guide, GuideSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from jaxserve.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class GrammarSpec(GuideSpec):
    """A compiled grammar, for the requests of one prompt."""

    name: str
    """The parameter and its value, for messages."""
    start: LLMatcher
    """At the beginning; copied for each request."""
    words: int
    """int32 numbers of llguidance's masks."""
    failed: Callable[[], None]
    """Is called when a request has failed at the grammar."""

    def guide(self, request: Request) -> GrammarGuide:
        """See `GuideSpec.guide`."""
        return GrammarGuide(self, request)


class GrammarGuide(Guide):
    """Lets tokens come that some text of the grammar goes on with. The end of text may come where
    the text is one of the grammar's, and is all that may where nothing can follow; before
    `min_new_tokens` it may only there. It fails its request where llguidance gives up: where no
    token can go on, or one of its limits on work and memory is exceeded; and where a mask takes so
    long that it holds up others."""

    masks = True

    def __init__(self, spec: GrammarSpec, request: Request) -> None:
        self._spec = spec
        self._matcher = spec.start.deep_copy()
        self._consumed = 0
        self._least = request.params.min_new_tokens
        self._ends = request.stop_ids

    def mask(self, outputs: Sequence[int], bits: np.ndarray) -> None:
        """Overwrites `bits`, so this guide is asked first."""
        started = time.perf_counter()
        if len(outputs) < self._consumed:
            self._matcher, self._consumed = self._spec.start.deep_copy(), 0
        if len(outputs) > self._consumed:
            self._matcher.consume_tokens(list(outputs[self._consumed :]))
            self._consumed = len(outputs)
        filled = bits if bits.size == self._spec.words else np.empty(self._spec.words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(filled.ctypes.data, filled.nbytes)
        if self._matcher.is_error():
            raise self._failure(outputs, said(self._matcher.get_error()))
        seconds = time.perf_counter() - started
        if seconds > SLOWEST_MASK:
            raise self._failure(outputs, f"it is too complex: a mask took {seconds:.1f} s")
        if filled is not bits:
            bits[:] = filled[: bits.size]
            if not bits.any():
                raise self._failure(outputs, "only tokens can go on that the model does not have")
        if len(outputs) < self._least:
            self._go_on(bits)

    def _failure(self, outputs: Sequence[int], reason: str) -> RequestFailedError:
        self._spec.failed()
        name, count = self._spec.name, len(outputs)
        return RequestFailedError(
            f"the request failed after {count} tokens, at its grammar {name}: {reason}"
        )

    def _go_on(self, bits: np.ndarray) -> None:
        """Let no end come, unless nothing else may."""
        others = bits.copy()
        words = others.view(np.uint32)
        for token in self._ends:
            words[token >> 5] &= ~np.uint32(1 << (token & 31))
        if others.any():
            bits[:] = others
