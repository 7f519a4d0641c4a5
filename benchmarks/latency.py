"""Time to first token and time per token of a few requests, with the bandwidth they imply.

    python -m benchmarks.latency --model llama-3.1-8b --rows 1 --out result.json

Time to first token: median wall time of runs with one new token. Time per token: (median with 256
new tokens - that) / 255. A decode step reads every weight once, and each row's keys and values;
those bytes over the time per token are the bandwidth reached.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks import machine, workloads
from benchmarks.offline_throughput import generate

PROMPT, OUTPUT = 128, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of Engine options")
    options = parser.parse_args()
    sampling = {"temperature": 0.8, "top_p": 0.95} if options.sampled else {"temperature": 0}

    import jaxserve

    with tempfile.TemporaryDirectory() as root:
        model = workloads.write_model(options.model, Path(root))
        started = time.perf_counter()
        engine = jaxserve.Engine(
            model_path=str(model), load_format="dummy", skip_tokenizer_init=True, **options.engine
        )
        startup = time.perf_counter() - started
        vocab = workloads.SHAPES[options.model]["vocab_size"]
        case = f"lat{options.rows}"
        generate(engine, workloads.requests(case, vocab, seed=1), sampling)
        before = engine.get_server_info()
        first, whole = [], []
        for seed in range(2, 2 + options.repeats):
            items = workloads.requests(case, vocab, seed=seed)
            first.append(generate(engine, [(ids, 1) for ids, _ in items], sampling))
            whole.append(generate(engine, items, sampling))
        info = engine.get_server_info()
        engine.shutdown()
    middle = options.repeats // 2
    ttft = sorted(first)[middle]
    per_token = (sorted(whole)[middle] - ttft) / (OUTPUT - 1)
    late = info["late_compiles"] - before["late_compiles"]
    itemsize = 4 if machine.describe()["platform"] == "cpu" else 2
    floor = machine.Floor(workloads.SHAPES[options.model], itemsize)
    moved = floor.decode_bytes(options.rows * (PROMPT + OUTPUT // 2))
    width = machine.copy_bandwidth()
    result = {
        **machine.describe(),
        "benchmark": "latency",
        "model": options.model,
        "engine": options.engine,
        "rows": options.rows,
        "sampled": options.sampled,
        "ttft_ms": round(ttft * 1e3, 2),
        "ms_per_token": round(per_token * 1e3, 3),
        "tokens_per_s": round(options.rows / per_token, 1),
        "end_to_end_tokens_per_s": round(options.rows * OUTPUT / sorted(whole)[middle], 1),
        "gb_per_s": round(moved / per_token / 1e9, 1),
        "copy_gb_per_s": round(width / 1e9, 1),
        "share_of_copy_bandwidth": round(moved / per_token / width, 3),
        "host_ms_per_step": round(info["host_ms_per_step"], 3),
        "late_compiles": late,
        "startup_seconds": round(startup, 1),
        "memory_gib": {k: round(v, 3) for k, v in info["memory_usage"].items()},
    }
    print(json.dumps(result), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if late:
        raise SystemExit(f"{late} programs were compiled during the timed runs")


if __name__ == "__main__":
    main()
