"""A logit processor as a guide of one request. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxserve.errors import RequestFailedError
from jaxserve.guides.guide import Guide, GuideSpec
from jaxserve.request import Request

Processor = Callable[[np.ndarray, list[dict[str, Any]]], Any]
"""As `CustomLogitProcessor.__call__`."""


@dataclasses.dataclass
class ProcessedRequest:
    """What a processor finds as "__req__"."""

    rid: str
    """The request's id."""
    origin_input_ids: list[int]
    """The prompt."""
    output_ids: list[int]
    """All tokens so far."""


class ProcessorGuide(Guide):
    """Asks a processor about each token."""

    edits = True

    def __init__(self, processor: Processor, request: Request) -> None:
        self._processor = processor
        self._seen = ProcessedRequest(request.rid, list(request.prompt_ids), [])
        self._params = {**(request.params.custom_params or {}), "__req__": self._seen}

    def edit(self, outputs: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """Raises RequestFailedError if what comes back is no row of logits."""
        self._seen.output_ids = list(outputs)
        found = np.asarray(self._processor(logits[None], [self._params]))
        if found.shape != (1, *logits.shape) or found.dtype.kind != "f":
            raise RequestFailedError(
                f"custom_logit_processor returned {found.dtype}{list(found.shape)}, expected "
                f"float32[1, {len(logits)}]"
            )
        return found[0].astype(np.float32, copy=False)


@dataclasses.dataclass(frozen=True)
class ProcessorSpec(GuideSpec):
    """What `custom_logit_processor` says of one prompt."""

    make: Callable[[], Processor]
    """Called for each request."""

    def guide(self, request: Request) -> ProcessorGuide:
        return ProcessorGuide(self.make(), request)
