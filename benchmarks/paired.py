"""This checkout against another one, in turns on the same machine: is anything slower?

    git archive COMMIT jaxserve pallas_kernels converters benchmarks | tar -x -C .base
    python -m benchmarks.paired --base .base --model qwen2.5-0.5b --cases lat1 uniform

Runs `benchmarks.suite` in the base, here, in the base, ... `--turns` times each, every time in a
process of its own, and compares the runs of each case: medians, their ratio (over 1 is faster
here), and its interval of 90% by bootstrap. "slower" is a ratio under 0.99 whose interval lies
below 1; an interval wider than 2% to either side says that the turns were too few to tell.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESAMPLES = 2000
TIMES = ("ms_per_token_runs", "seconds")
"""Of a case's result, the first that it has: what is compared, less is better."""


def interval(base: Sequence[float], here: Sequence[float]) -> tuple[float, float]:
    """Of the ratio of medians, 90% by bootstrap with a fixed seed."""
    draw = random.Random(0)
    ratios = sorted(
        statistics.median(draw.choices(base, k=len(base)))
        / statistics.median(draw.choices(here, k=len(here)))
        for _ in range(RESAMPLES)
    )
    return ratios[RESAMPLES // 20], ratios[-RESAMPLES // 20]


def compare(base: Sequence[float], here: Sequence[float]) -> dict[str, Any]:
    """Both sides' times of one case."""
    ratio = statistics.median(base) / statistics.median(here)
    low, high = interval(base, here)
    wide = low < ratio * 0.98 or high > ratio * 1.02
    return {
        "base": statistics.median(base),
        "here": statistics.median(here),
        "runs": [len(base), len(here)],
        "ratio": round(ratio, 4),
        "interval": [round(low, 4), round(high, 4)],
        "verdict": "not measured" if wide else "slower" if ratio < 0.99 and high < 1 else "ok",
    }


def turn(folder: Path, arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results by case of one process of the suite in `folder`. SystemExit when it fails."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.suite", *arguments, "--out-dir", out]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        results = [json.loads(path.read_text()) for path in Path(out).glob("*.json")]
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", flush=True)
            if not results:
                sys.exit(f"{' '.join(command)} failed in {folder}")
        return {result["case"]: result for result in results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--out", type=Path)
    options, arguments = parser.parse_known_args()
    here = Path(__file__).resolve().parent.parent
    times: dict[str, tuple[list[float], list[float]]] = {}
    starts: tuple[list[float], list[float]] = ([], [])
    device = ""
    for number in range(2 * options.turns):
        side = number % 2
        for case, result in turn((options.base, here)[side], arguments).items():
            runs = next(result[key] for key in TIMES if key in result)
            times.setdefault(case, ([], []))[side].extend(runs)
            startup, device = result["startup_seconds"], result["device"]
        starts[side].append(startup)
        print(f"turn {number + 1}: {('base', 'here')[side]}, start {startup} s", flush=True)
        if not side:
            continue
        # After every pair: a machine that is taken away leaves what there was.
        result = {"device": device, "arguments": arguments, "startup_seconds": starts}
        result |= {case: compare(*both) for case, both in times.items()}
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
