"""Beside transformers' `generate` on this CPU: SmolLM2-135M-Instruct, float32, the same threads.

    python -m benchmarks.cpu [--rounds 3] [--out result.json]

A single stream of 64 tokens, and 16 prompts x 64 tokens (transformers pads them into one batch),
each timed in turn with the other engine, after a warm-up of both. Needs the test extra (torch).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import jaxserve
from benchmarks import machine
from converters import load
from converters.save import save

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from demo_model import fetch

NEW = 64
PROMPTS = [
    f"{opening} {topic}"
    for opening in ("Explain in a few sentences", "Write a short story about", "What is", "List")
    for topic in ("the water cycle.", "a lighthouse keeper", "gravity?", "five rivers of Europe:")
]


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    path = fetch()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        save(load(str(path), dtype="float32"), folder, "safetensors")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.eval()
    ours = jaxserve.Engine(model_path=str(path))
    tokenizer = ours.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def run_ours(prompts: list[str]) -> None:
        params = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
        results = ours.generate(prompts, params)
        assert all(len(r["output_ids"]) == NEW for r in results)

    @torch.no_grad()
    def run_theirs(prompts: list[str]) -> None:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        out = theirs.generate(
            **batch,
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert out.shape[1] - batch["input_ids"].shape[1] == NEW

    result = {**machine.describe(), "benchmark": "cpu", "model": "SmolLM2-135M-Instruct float32"}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, prompts in (("single", PROMPTS[:1]), ("batch16", PROMPTS)):
        run_ours(prompts)
        run_theirs(prompts)
        pairs = [
            (seconds(lambda: run_ours(prompts)), seconds(lambda: run_theirs(prompts)))  # noqa: B023
            for _ in range(options.rounds)
        ]
        tokens = NEW * len(prompts)
        result[name] = {
            "jaxserve_tokens_per_s": round(tokens / statistics.median(a for a, _ in pairs), 1),
            "transformers_tokens_per_s": round(tokens / statistics.median(b for _, b in pairs), 1),
            "ratio": round(statistics.median(b / a for a, b in pairs), 2),
            "ratios": [round(b / a, 2) for a, b in pairs],
        }
    result["late_compiles"] = ours.get_server_info()["late_compiles"]
    ours.shutdown()
    print(json.dumps(result), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
