"""400 requests as 400 asyncio tasks of one running event loop; the engine batches them by itself.

    python examples/many_tasks.py [--model PATH] [--tasks 400] [--tokens 8]

Prints some of the texts and the throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from demo_model import fetch

import jaxserve


async def ask(engine: jaxserve.Engine, number: int, tokens: int) -> str:
    """One task: knows nothing of the others."""
    prompt = f"The number {number} is"
    params = {"temperature": 0.8, "max_new_tokens": tokens, "ignore_eos": True}
    result = await engine.async_generate(prompt, params)
    return prompt + result["text"]


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="checkpoint folder, .gguf file or hub id")
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of each task")
    given = parser.parse_args()

    # Made inside the running loop: the engine has a thread of its own and borrows no loop.
    with jaxserve.Engine(model_path=given.model or str(fetch())) as engine:
        started = time.perf_counter()
        texts = await asyncio.gather(*(ask(engine, i, given.tokens) for i in range(given.tasks)))
        seconds = time.perf_counter() - started
        for text in texts[:3]:
            print(repr(text))
        rows = engine.get_server_info()["max_running_requests"]
        print(
            f"{len(texts)} tasks, {given.tasks * given.tokens / seconds:.1f} output tokens/s, "
            f"{len(texts) / seconds:.1f} requests/s, up to {rows} at a time"
        )


if __name__ == "__main__":
    asyncio.run(main())
