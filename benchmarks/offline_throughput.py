"""Output tokens per second of one `Engine.generate` over many requests.

    python -m benchmarks.offline_throughput --model llama-3.1-8b --case uniform --out result.json

A warm-up over a quarter of the requests (other token ids, at most 64 new tokens) comes first; the
timed call must compile nothing. Prints one JSON object, with the device, the versions, the commit,
the host's milliseconds per step, and the share of the physical floor: the prefill's FLOPs at the
measured matrix rate plus the decode steps' bytes at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, workloads


def generate(engine: Any, items: list[tuple[list[int], int]], sampling: dict[str, Any]) -> float:
    """Seconds of one call over `items`; every request must give its full length."""
    params = [{**sampling, "max_new_tokens": out, "ignore_eos": True} for _, out in items]
    started = time.perf_counter()
    results = engine.generate(input_ids=[ids for ids, _ in items], sampling_params=params)
    seconds = time.perf_counter() - started
    assert [len(r["output_ids"]) for r in results] == [out for _, out in items]
    return seconds


def floor_seconds(floor: machine.Floor, items: list, rows: int, rate: float, width: float) -> float:
    """Prefill at `rate` FLOP/s, then decode at `width` bytes/s with at most `rows` rows at once:
    the fewest steps that produce all tokens, each reading the weights once."""
    prefill = sum(floor.prefill_flops(len(ids)) for ids, _ in items) / rate
    tokens = sum(out - 1 for _, out in items)
    steps = max(math.ceil(tokens / rows), max(out for _, out in items) - 1)
    cached = sum(len(ids) * (out - 1) + out * (out - 1) // 2 for ids, out in items)
    decode = (steps * floor.decode_bytes(0) + floor.kv_bytes * cached) / width
    return prefill + decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(workloads.SHAPES))
    parser.add_argument("--case", default="uniform", choices=["uniform", "ragged", "prefix"])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95")
    parser.add_argument("--repeats", type=int, default=3)
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
        warm = workloads.requests(options.case, vocab, seed=1, scale=options.scale / 4)
        generate(engine, [(ids, min(out, 64)) for ids, out in warm], sampling)
        before = engine.get_server_info()
        timed = workloads.requests(options.case, vocab, seed=2, scale=options.scale)
        times = [generate(engine, timed, sampling) for _ in range(options.repeats)]
        info = engine.get_server_info()
        engine.shutdown()
    seconds = sorted(times)[len(times) // 2]
    late = info["late_compiles"] - before["late_compiles"]
    steps = info["extend_steps"] + info["decode_steps"]
    itemsize = 4 if machine.describe()["platform"] == "cpu" else 2
    floor = machine.Floor(workloads.SHAPES[options.model], itemsize)
    width, rate = machine.copy_bandwidth(), machine.matmul_rate()
    least = floor_seconds(floor, timed, info["max_running_requests"], rate, width)
    outputs = sum(out for _, out in timed)
    result = {
        **machine.describe(),
        "benchmark": "offline_throughput",
        "model": options.model,
        "case": options.case + ("_s" if options.sampled else ""),
        "engine": options.engine,
        "requests": len(timed),
        "input_tokens": sum(len(ids) for ids, _ in timed),
        "output_tokens": outputs,
        "seconds": [round(t, 3) for t in times],
        "output_tokens_per_s": round(outputs / seconds, 1),
        "floor_seconds": round(least, 3),
        "share_of_floor": round(least / seconds, 3),
        "copy_gb_per_s": round(width / 1e9, 1),
        "matmul_tflop_per_s": round(rate / 1e12, 1),
        "host_ms_per_step": round(info["host_ms_per_step"], 3),
        "steps": steps - before["extend_steps"] - before["decode_steps"],
        "late_compiles": late,
        "programs": info["programs"],
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
