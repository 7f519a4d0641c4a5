"""What quantization costs in quality: the demo model on a fixed English text, on any device.

    python -m benchmarks.quality [--model PATH] [--dtype float32] [--text FILE] [--out FILE]

Each variant runs over the same token ids in an engine of its own. Perplexity is exp of the mean
negative logprob of the text's tokens but the first; differences are of each token's logprob to the
engine without quantization. Weights are all parameters, embeddings included, which keep --dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

import jaxserve
from benchmarks import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from demo_model import fetch

TEXT = Path(__file__).parent / "quality_text.txt"
BASELINE = "unquantized"
VARIANTS: dict[str, dict[str, str]] = {
    BASELINE: {},
    "fp8": {"quantization": "fp8"},
    "w8a16_int8": {"quantization": "w8a16_int8"},
    "kv fp8_e4m3": {"kv_cache_dtype": "fp8_e4m3"},
    "fp8, kv fp8_e4m3": {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"},
}


def measure(
    model: str, dtype: str, text: str, options: dict[str, str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logprob of each token of `text` but the first, and what the engine says of its memory."""
    with jaxserve.Engine(
        model_path=model, dtype=dtype, max_running_requests=1, precompile=False, **options
    ) as engine:
        ids = engine.tokenizer(text)["input_ids"]
        result = engine.generate(
            input_ids=ids,
            sampling_params={"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        usage = engine.get_server_info()["memory_usage"]
    logprobs = np.array([value for value, *_ in result["meta_info"]["input_token_logprobs"][1:]])
    assert len(logprobs) == len(ids) - 1 and np.isfinite(logprobs).all()
    return logprobs, {
        "weight_mib": round(usage["weight"] * 1024, 1),
        "kv_bytes_per_token": round(usage["kvcache"] * 2**30 / usage["token_capacity"]),
    }


def run(model: str, dtype: str, text: str) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    exact = np.zeros(0)
    for name, options in VARIANTS.items():
        logprobs, memory = measure(model, dtype, text, options)
        row = {**options, "perplexity": round(math.exp(-logprobs.mean()), 4)}
        if name == BASELINE:
            exact = logprobs
        else:
            difference = np.abs(logprobs - exact)
            row["mean_abs_logprob_difference"] = round(float(difference.mean()), 5)
            row["max_abs_logprob_difference"] = round(float(difference.max()), 5)
        rows[name] = row | memory
    return {
        "benchmark": "quality",
        **machine.describe(),
        "model": Path(model).stem,
        "dtype": dtype,
        "tokens": len(exact),
        "variants": rows,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':18} perplexity   mean |dlogp|   max |dlogp|   weights MiB   KV bytes a token"]
    for name, row in result["variants"].items():
        mean, most = (row.get(f"{x}_abs_logprob_difference", 0.0) for x in ("mean", "max"))
        lines.append(
            f"{name:18} {row['perplexity']:10.3f} {mean:14.4f} {most:13.3f} "
            f"{row['weight_mib']:13.1f} {row['kv_bytes_per_token']:18}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: the demo model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    result = run(
        options.model or str(fetch()), options.dtype, options.text.read_text(encoding="utf-8")
    )
    print(table(result))
    print(json.dumps(result), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
