"""`log_requests`: a line when a request comes and one when it ends, on the caller's thread."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from jaxserve.output.result import Output
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.codec import Codec

logger = logging.getLogger("jaxserve.requests")
COUNTS, PARAMETERS, PARTIAL, EVERYTHING = range(4)
"""The levels: each also logs what those before it do."""
SHOWN = 2048
"""Characters of an input or output at level PARTIAL."""


class RequestLog:
    """Logs requests at level INFO on the logger `jaxserve.requests`, which this turns on whatever
    the engine's log_level."""

    def __init__(self, level: int, codec: Codec | None) -> None:
        """level: one of the above. codec: shows inputs as text; None shows token ids."""
        self._level = level
        self._codec = codec
        logger.setLevel(logging.INFO)

    def received(self, request: Request) -> None:
        """The request is about to be queued."""
        facts = {
            "rid": request.rid,
            "prompt_tokens": len(request.prompt_ids),
            "max_new_tokens": request.max_new_tokens,
            "stream": request.stream_interval > 0,
        }
        if self._level >= PARAMETERS:
            facts["sampling_params"] = _given(request.params)
        if self._level >= PARTIAL:
            ids = request.prompt_ids
            facts["input"] = self._shown(ids if self._codec is None else self._codec.decode(ids))
        _log("Receive", facts)

    def finished(self, output: Output) -> None:
        """The request has its result."""
        result = output.result()
        meta = result["meta_info"]
        facts = {
            "rid": meta["id"],
            "finish_reason": meta["finish_reason"],
            "prompt_tokens": meta["prompt_tokens"],
            "completion_tokens": meta["completion_tokens"],
            "cached_tokens": meta["cached_tokens"],
            "num_retractions": meta["num_retractions"],
            "e2e_latency": round(meta["e2e_latency"], 6),
        }
        if self._level >= PARTIAL:
            facts["output"] = self._shown(result.get("text", result["output_ids"]))
        _log("Finish", facts)

    def failed(self, request: Request, error: BaseException) -> None:
        """The engine failed."""
        _log("Fail", {"rid": request.rid, "error": f"{type(error).__name__}: {error}"})

    def left(self, request: Request) -> None:
        """The caller does not wait for the request any more."""
        _log("Abort", {"rid": request.rid})

    def _shown(self, value: Any) -> str:
        text = repr(value)
        if self._level >= EVERYTHING or len(text) <= SHOWN:
            return text
        return f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def _given(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not at their defaults."""
    default = SamplingParams()
    pairs = ((field.name, getattr(params, field.name)) for field in dataclasses.fields(params))
    return {name: value for name, value in pairs if value != getattr(default, name)}


def _log(event: str, facts: dict[str, Any]) -> None:
    shown = ", ".join(
        f"{name}={value if name in ('input', 'output') else repr(value)}"
        for name, value in facts.items()
    )
    logger.info("%s: %s", event, shown)
