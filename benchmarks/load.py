"""How long loading takes and how much memory it needs, by checkpoint format.

    python -m benchmarks.load MODEL [--work DIR] [--dtype float32] [--rounds 5] [--output FILE]

MODEL is a .gguf file or a Hugging Face folder. It is saved as safetensors and as Orbax in DIR,
both in --dtype; then each format is loaded in processes of its own, the formats taking turns.
Times are seconds with the files in the page cache: of the first load in a process, and of the
fastest of three later ones. Memory is RssAnon (mapped file pages do not count): the peak during
the first load, above what the process had after making a tiny dummy model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import converters
from benchmarks.machine import describe
from benchmarks.memory import PeakMemory
from converters.load import read_config

MIB = 1 << 20


def measure(path: str, dtype: str, tiny: str) -> dict[str, Any]:
    """One process's figures: load `tiny` to start the libraries up, then `path` four times."""
    converters.load(tiny, load_format="dummy")
    with PeakMemory() as memory:
        loaded = converters.load(path, dtype=dtype)
    sizes = [array.nbytes for array in loaded.params.values()]
    first = loaded.load_seconds
    del loaded
    later = min(converters.load(path, dtype=dtype).load_seconds for _ in range(3))
    return {
        "first_s": first,
        "later_s": later,
        "peak_mib": memory.bytes / MIB,
        "model_mib": sum(sizes) / MIB,
        "largest_mib": max(sizes) / MIB,
    }


def prepare(model: str, dtype: str, work: Path) -> dict[str, str]:
    """Format -> path; the safetensors and Orbax copies are made where `work` lacks them."""
    paths = {}
    loaded = None
    for name in ("safetensors", "orbax"):
        folder = work / f"{Path(model).stem}-{dtype}-{name}"
        paths[name] = str(folder)
        if not folder.exists():
            loaded = loaded or converters.load(model, dtype=dtype)
            converters.save(loaded, folder, name)
    if model.endswith(".gguf"):
        paths["gguf"] = model
    tiny = work / "tiny"
    tiny.mkdir(exist_ok=True)
    config = read_config(Path(paths["orbax"]))
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    (tiny / "config.json").write_text(json.dumps(config | small), encoding="utf-8")
    return paths


def run(model: str, dtype: str, work: Path, rounds: int) -> dict[str, Any]:
    paths = prepare(model, dtype, work)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            command = [sys.executable, "-m", "benchmarks.load", path, "--dtype", dtype]
            output = subprocess.run(
                [*command, "--measure", str(work / "tiny")], check=True, capture_output=True
            ).stdout
            samples[name].append(json.loads(output.splitlines()[-1]))
    formats = {
        name: {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        for name, rows in samples.items()
    }
    for row in formats.values():
        row["peak_allowed_mib"] = row["model_mib"] + 2 * row["largest_mib"]
    ratios = {
        f"orbax_over_{other}": round(formats["orbax"]["later_s"] / formats[other]["later_s"], 3)
        for other in formats
        if other != "orbax"
    }
    return {
        "benchmark": "load",
        **describe(),
        "model": Path(model).name,
        "dtype": dtype,
        "rounds": rounds,
        "formats": formats,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="loading time and memory by checkpoint format")
    parser.add_argument("model", help=".gguf file or Hugging Face folder")
    parser.add_argument("--work", type=Path, help="where the copies go (default: temporary)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--measure", metavar="TINY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.model, args.dtype, args.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = run(args.model, args.dtype, work, args.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
