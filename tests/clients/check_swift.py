"""ms-swift: its SglangEngine beside its TransformersEngine, on the same weights."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import questions
import torch
from swift.infer_engine import InferRequest, RequestConfig, SglangEngine, TransformersEngine

TOKENS = 24
OPTIONS: dict[str, Any] = {
    "model_type": "llama",
    "template_type": "chatml",
    "torch_dtype": torch.float32,
}


def requests() -> list[InferRequest]:
    return [InferRequest(messages=[{"role": "user", "content": q}]) for q in questions.CHATS]


def answers(engine: Any) -> list[str]:
    config = RequestConfig(max_tokens=TOKENS, temperature=0)
    responses = engine.infer(requests(), config, use_tqdm=False)
    return [response.choices[0].message.content for response in responses]


async def streamed(engine: Any) -> str:
    config = RequestConfig(max_tokens=TOKENS, temperature=0, stream=True)
    stream = await engine.infer_async(requests()[0], config)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk])


def main(model: str, scratch: str) -> int:
    del scratch
    ours = SglangEngine(model, context_length=4096, **OPTIONS)
    mine = answers(ours)
    stream = asyncio.run(streamed(ours))
    ours.engine.shutdown()
    theirs = answers(TransformersEngine(model, max_batch_size=1, **OPTIONS))
    failures = stream != mine[0]
    print(f"\nms-swift, {len(mine)} chats of {TOKENS} tokens")
    for question, expected, answer in zip(questions.CHATS, theirs, mine, strict=True):
        same = answer == expected
        failures += not same
        print(f"{'same' if same else 'DIFFERENT':<10}{question!r}: {answer!r}")
        if not same:
            print(f"{'':<10}TransformersEngine: {expected!r}")
    print(f"{'same' if stream == mine[0] else 'DIFFERENT':<10}streamed: {stream!r}")
    print("FAILED" if failures else "passed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
