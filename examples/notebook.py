"""The engine where an event loop already runs, as in a notebook cell. Nothing needs patching:

- await `async_generate`, or
- call `generate` in a coroutine (it blocks the loop, like any function that takes a while).

SGLang's recipe, `nest_asyncio.apply()` and then `asyncio.run(...)` in a cell, works as well.

    python examples/notebook.py [MODEL_PATH]
"""

from __future__ import annotations

import asyncio
import sys

import nest_asyncio
from demo_model import fetch

import jaxserve
from jaxserve.utils import async_stream_and_merge, stream_and_merge

PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_new_tokens": 8}


async def cells() -> None:
    """IPython runs each cell like this: as a coroutine of a loop that is running already."""
    llm = jaxserve.Engine(model_path=sys.argv[1] if len(sys.argv) > 1 else str(fetch()))

    print("== without nest_asyncio ==")
    print("await async_generate:", repr((await llm.async_generate(PROMPT, GREEDY))["text"]))
    print("generate:", repr(llm.generate(PROMPT, GREEDY)["text"]))
    print("stream_and_merge:", repr(stream_and_merge(llm, PROMPT, GREEDY)))

    print("== with nest_asyncio ==")
    nest_asyncio.apply()

    async def main() -> None:
        outputs = await llm.async_generate([PROMPT, PROMPT], GREEDY)
        print("asyncio.run:", [output["text"] for output in outputs])
        print("generate inside it:", repr(llm.generate(PROMPT, GREEDY)["text"]))
        pieces = [piece async for piece in async_stream_and_merge(llm, PROMPT, GREEDY)]
        print("async_stream_and_merge:", pieces)

    asyncio.run(main())
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(cells())
