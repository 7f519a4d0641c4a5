"""How long running streams wait for their tokens while a long prompt comes in.

    python -m benchmarks.interference --model llama-3.1-8b --length 100000 --out result.json

Some streams run, with prompts of 128 tokens; a long prompt arrives. Reported: the gaps between the
streams' tokens from its arrival to its first token, by the clock of their reader; the prompt's time
to first token beside them and alone. Once with the engine's chunks, and once without any where the
prompt fits max_prefill_tokens (--engine '{"max_prefill_tokens": 100352}').
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import machine, workloads
from benchmarks.engine import Counts, differences, dummy_engine
from jaxserve.server_args import ServerArgs

T = TypeVar("T")
STREAM_PROMPT, SETTLED = 128, 16
"""Tokens of a stream's prompt; tokens each has before anything is measured."""
GREEDY = {"temperature": 0, "ignore_eos": True}


def tokens(model: str, count: int, seed: str) -> list[int]:
    """Random ids, others for each seed."""
    vocab = workloads.SHAPES[model]["vocab_size"]
    return workloads.random_ids(random.Random(seed), vocab, count)


def gaps(times: Sequence[float], since: float, until: float) -> list[float]:
    """Of the gaps between the `times`, those that overlap the time from `since` to `until`."""
    return [b - a for a, b in itertools.pairwise(times) if b > since and a < until]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * round(100 * share) // 100) - 1, 0)]


async def first_token(engine: Any, ids: list[int]) -> tuple[float, float]:
    """When a prompt was submitted, and when its first token had come."""
    submitted = time.perf_counter()
    await engine.async_generate(input_ids=ids, sampling_params={**GREEDY, "max_new_tokens": 1})
    return submitted, time.perf_counter()


async def beside_streams(
    engine: Any,
    model: str,
    prompts: Sequence[T],
    count: int,
    longest: int,
    arrive: Callable[[Any, T], Awaitable[tuple[float, float]]] = first_token,
) -> tuple[list[tuple[float, float]], list[list[float]]]:
    """(submission and first token of each prompt, one after the other; when each stream's tokens
    came), while `count` streams of up to `longest` tokens run. arrive: submits a prompt."""
    times: list[list[float]] = [[] for _ in range(count)]

    async def follow(number: int) -> None:
        ids = tokens(model, STREAM_PROMPT, f"stream/{number}")
        params = {**GREEDY, "max_new_tokens": longest}
        stream = await engine.async_generate(
            input_ids=ids, sampling_params=params, stream=True, rid=f"stream-{number}-"
        )
        async for _ in stream:
            times[number].append(time.perf_counter())

    async def more(tokens: int) -> None:
        """Until each stream has that many more."""
        goals = [len(stream) + tokens for stream in times]
        while any(len(stream) < goal for stream, goal in zip(times, goals, strict=True)):
            if any(task.done() for task in tasks):
                raise RuntimeError("a stream ended before the prompts were through")
            await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(follow(number)) for number in range(count)]
    spans = []
    for prompt in prompts:
        await more(SETTLED)
        spans.append(await arrive(engine, prompt))
    await more(1)  # so that the last gap ends
    engine.abort_request("stream-")
    await asyncio.gather(*tasks)
    return spans, times


def measure(engine: Any, model: str, length: int, streams: int, repeats: int) -> dict[str, Any]:
    """One way of chunking. The first prompt of each kind warms up."""
    alone, beside = (
        [tokens(model, length, f"{kind}/{i}") for i in range(repeats + 1)]
        for kind in ("alone", "beside")
    )
    asyncio.run(first_token(engine, alone[0]))
    longest = engine.server_args.context_length - STREAM_PROMPT - 1
    asyncio.run(beside_streams(engine, model, beside[:1], streams, longest))
    before = engine.get_server_info()
    singly = [b - a for a, b in (asyncio.run(first_token(engine, ids)) for ids in alone[1:])]
    spans, times = asyncio.run(beside_streams(engine, model, beside[1:], streams, longest))
    counted = differences(before, engine.get_server_info(), Counts())
    waits = [gap for span in spans for stream in times for gap in gaps(stream, *span)]
    calm = [gap for stream in times for gap in gaps(stream, stream[0], spans[0][0])]
    ttft = statistics.median(b - a for a, b in spans)
    return {
        "gap_ms": {
            name: round(1e3 * percentile(waits, share), 2)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        },
        "gaps": len(waits),
        "undisturbed_gap_ms": round(1e3 * percentile(calm, 0.5), 2),
        "ttft_beside_s": round(ttft, 4),
        "ttft_alone_s": round(statistics.median(singly), 4),
        "ttft_ratio": round(ttft / statistics.median(singly), 3),
        **counted,
    }


def run(
    model: str, length: int, streams: int, repeats: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole result, for engines with `options`."""
    context = length + 4096
    options = {
        "max_running_requests": streams + 1,
        "context_length": context,
        "json_model_override_args": {"max_position_embeddings": context},
        "stream_output": True,
        **options,
    }
    ways = [options]
    if length <= ServerArgs(model, **options).max_prefill_tokens:
        ways.append({**options, "chunked_prefill_size": -1})
    result: dict[str, Any] = {}
    found = []
    for way in ways:
        with dummy_engine(model, way) as (engine, _):
            # Not before: asking for the device starts JAX, with its own limit of the memory.
            result = machine.describe()
            measured = measure(engine, model, length, streams, repeats)
            found.append({"chunked_prefill_size": way.get("chunked_prefill_size"), **measured})
            print(json.dumps(found[-1]), flush=True)
    return {
        **result,
        "benchmark": "interference",
        "model": model,
        "engine": options,
        "prompt_tokens": length,
        "streams": streams,
        "repeats": repeats,
        "ways": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--length", type=int, default=100_000, help="tokens of the long prompt")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="timed prompts, each way")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = run(given.model, given.length, given.streams, given.repeats, given.engine)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
