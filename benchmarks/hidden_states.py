"""What hidden states and logits cost the requests that ask for them.

    python -m benchmarks.hidden_states --model llama-3.1-8b --out result.json
    python -m benchmarks.hidden_states --model tiny --scale 0.1 --turns 1 --engine \\
        '{"precompile": true, "max_running_requests": 8}'

As many requests as run at once, of 512 tokens and 256 new ones (`uniform`, fewer of them), in one
engine: none asks for anything ("plain"), each for the "last" hidden state, or for all of them
("full"), in turns. Reported of each way: seconds of the call, results converted and handed over
included; the throughput as a share of plain's, turn by turn and their median; ms of a decode step,
from the same requests with one new token, and its ratio to plain's. "copied" are the bytes that
went to the host for it, "asked" those that the callers had asked for in the model's own type.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, workloads
from benchmarks.engine import Counts, Requests, differences, dummy_engine, generate

ROWS = 64
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "last": {"return_hidden_states": "last"},
    "full": {"return_hidden_states": True},
}
GREEDY = {"temperature": 0}


class Copies:
    """Bytes that an engine's picker sends to the host."""

    def __init__(self, engine: Any) -> None:
        self.bytes = 0
        picker = engine._loop._runner._picker
        real = picker._pick

        def counted(*arguments: Any) -> Any:
            picked = real(*arguments)
            self.bytes += sum(piece.nbytes for piece in picked.pieces)
            return picked

        picker._pick = counted

    def take(self) -> int:
        """Since the last call."""
        copied, self.bytes = self.bytes, 0
        return copied


def asked(way: str, items: Requests, position: int) -> int:
    """Bytes that the requests ask for, `position` of each position."""
    counts = {"plain": 0, "last": len(items), "full": sum(len(ids) + n - 1 for ids, n in items)}
    return counts[way] * position


def measure(engine: Any, model: str, scale: float, turns: int) -> dict[str, Any]:
    """All ways, `turns` times each, after a turn that warms up."""
    shape, copies = workloads.SHAPES[model], Copies(engine)
    vocab = shape["vocab_size"]
    size = 2 if engine._loop._runner.dtype.itemsize == 2 else 4
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "step_ms": [], "copied": [], "asked": []} for name in WAYS
    }
    before: Mapping[str, Any] = {}
    for turn in range(turns + 1):
        if turn == 1:
            before = engine.get_server_info()
        for number, (name, options) in enumerate(WAYS.items()):
            seed = 100 * turn + number
            items = workloads.requests("uniform", vocab, seed, scale)
            seconds = generate(engine, items, GREEDY, **options)
            copied = copies.take()
            short = [(ids, 1) for ids, _ in workloads.requests("uniform", vocab, seed + 50, scale)]
            prefill = generate(engine, short, GREEDY, **options)
            copies.take()
            if turn:
                step = (seconds - prefill) / (max(new for _, new in items) - 1)
                found[name]["step_ms"].append(round(1e3 * step, 4))
                found[name]["seconds"].append(round(seconds, 4))
                found[name]["copied"].append(copied)
                found[name]["asked"].append(asked(name, items, size * shape["hidden_size"]))
    counted = differences(before, engine.get_server_info(), Counts())
    plain = found["plain"]
    for way in found.values():
        ratios = [one / other for one, other in zip(plain["seconds"], way["seconds"], strict=True)]
        way["ratios"] = [round(ratio, 4) for ratio in ratios]
        way["throughput_ratio"] = round(statistics.median(ratios), 4)
        steps = [b / a for a, b in zip(plain["step_ms"], way["step_ms"], strict=True)]
        way["step_ratio"] = round(statistics.median(steps), 4)
    return {"requests": len(items), "ways": found, **counted}


def run(model: str, scale: float, turns: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result, for an engine with `options`."""
    options = {
        "enable_return_hidden_states": True,
        "max_running_requests": ROWS,
        "max_state_bytes": 1 << 40,
        **options,
    }
    with dummy_engine(model, options, ["uniform"]) as (engine, _):
        result = machine.describe()
        measured = measure(engine, model, scale, turns)
    return {
        **result,
        "benchmark": "hidden_states",
        "model": model,
        "engine": options,
        "scale": scale,
        **measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", choices=workloads.SHAPES)
    parser.add_argument("--scale", type=float, default=0.25, help="share of uniform's 256 requests")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--engine", type=json.loads, default={}, help="further options, JSON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = run(options.model, options.scale, options.turns, options.engine)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
