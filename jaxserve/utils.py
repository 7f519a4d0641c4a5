"""Helpers of SGLang's `sglang.utils` that its documents use with the engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from jaxserve.engine import Engine


def stream_and_merge(llm: Engine, prompt: str, sampling_params: Mapping[str, Any] | None) -> str:
    """Streams one prompt and returns its whole text, whether chunks are cumulative or deltas."""
    return "".join(new_texts(llm, llm.generate(prompt, sampling_params, stream=True)))


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


def new_texts(llm: Engine, chunks: Iterator[Mapping[str, Any]]) -> Iterator[str]:
    """What each chunk of one streamed request adds to the text before it."""
    merged = ""
    for chunk in chunks:
        piece = _new_text(llm, merged, chunk["text"])
        if piece:
            merged += piece
            yield piece


def _new_text(llm: Engine, merged: str, text: str) -> str:
    """What a chunk's text adds. Comparing texts would eat genuine repetitions in deltas, so the
    engine's option decides."""
    return text if llm.server_args.stream_output else text[len(merged) :]


def trim_overlap(existing_text: str, new_chunk: str) -> str:
    """`new_chunk` without the longest beginning that `existing_text` already ends with."""
    longest = min(len(existing_text), len(new_chunk))
    overlaps = (n for n in range(longest, 0, -1) if existing_text.endswith(new_chunk[:n]))
    return new_chunk[next(overlaps, 0) :]


def print_highlight(html_content: object) -> None:
    """Prints. (SGLang colours it where its documentation is built.)"""
    print(html_content)


def terminate_process(process: subprocess.Popen[Any] | BaseProcess) -> None:
    """Kills a started process and, on Linux, all that it has started, and waits for it to end.

    jaxserve starts none itself: this is for servers that notebooks have launched. One that has
    ended already is left alone.
    """
    status = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
    if status is not None or process.pid is None:
        return
    for pid in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    if isinstance(process, subprocess.Popen):
        process.wait()
    else:
        process.join()


def _descendants(pid: int) -> list[int]:
    """Ids of the processes that this one has started, and those have, where /proc says so."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    children = [int(child) for child in found]
    return [*children, *(each for child in children for each in _descendants(child))]
