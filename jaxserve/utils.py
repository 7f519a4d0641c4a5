"""Helpers of SGLang's `sglang.utils` that its documents use with the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from jaxserve.engine import Engine


def stream_and_merge(llm: Engine, prompt: str, sampling_params: Mapping[str, Any] | None) -> str:
    """Streams one prompt and returns its whole text, whether chunks are cumulative or deltas."""
    merged = ""
    for chunk in llm.generate(prompt, sampling_params, stream=True):
        merged += _new_text(llm, merged, chunk["text"])
    return merged


async def async_stream_and_merge(
    llm: Engine, prompt: str, sampling_params: Mapping[str, Any] | None
) -> AsyncIterator[str]:
    """Streams one prompt and yields each piece of new text, whichever way chunks are sent."""
    merged = ""
    async for chunk in await llm.async_generate(prompt, sampling_params, stream=True):
        piece = _new_text(llm, merged, chunk["text"])
        if piece:
            merged += piece
            yield piece


def _new_text(llm: Engine, merged: str, text: str) -> str:
    """What a chunk's text adds. Comparing texts would eat genuine repetitions in deltas, so the
    engine's option decides."""
    return text if llm.server_args.stream_output else text[len(merged) :]
