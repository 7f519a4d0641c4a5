"""What loading a checkpoint onto several devices takes: memory of the host and of each device.

    python -m benchmarks.loading --cpu-devices 8 --tp 2 8 --out loading.json
    python -m benchmarks.loading --model llama-3.1-8b --tp 2 --formats safetensors   # on two GPUs

For each format a checkpoint with random weights is written on the spot; for each number of devices
a fresh process loads it as an engine does, up to what a step is given. A thread reads the process's
anonymous memory meanwhile. Every process has a time limit; files are in the page cache.

    seconds         reading and placing
    weights_mb      of all devices, as they are placed: what several have counts several times,
                    unless they share it, as devices made of one CPU do
    largest_mb      the checkpoint's two largest tensors, in the dtype in which they are placed
    host_mb         the most anonymous memory, less that of the same process before: with the
                    devices started, and a tiny checkpoint loaded, because libraries allocate too
    excess_mb       host_mb less the weights, which on a CPU lie in the host's memory
    device_mb       the most that each GPU had in use, less before and less what it keeps
    device_largest_mb   its shards of the two largest tensors
    ok              excess_mb at most largest_mb, and device_mb at most device_largest_mb
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import converters
from benchmarks import checkpoints, children, machine, workloads
from benchmarks.memory import PeakMemory
from jaxserve.machine import machine_of
from jaxserve.parallel.mesh import bytes_on_each, first_device, numbered_mesh
from jaxserve.weights import arrange, cut_over, placement

_LLAMA = workloads.SHAPES["llama-3.1-8b"]
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA,
    "llama-1b": {
        **_LLAMA, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 20, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2,
    },
    "llama-40m": {
        **_LLAMA, "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2,
    },
    "tiny": {
        **_LLAMA, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
SECONDS = {"write": 80, "load": 80}
"""A process has at most."""
INTERVAL = 0.002
"""Seconds between two looks."""
MB = 1e6


def load_as_an_engine(path: Path, kind: str, dtype: str, tp: int) -> tuple[Any, Any]:
    """(the loaded model, its arrays as a step takes them) on the first `tp` devices."""
    mesh = numbered_mesh(jax.devices(), (1, tp), 0, 1)
    device = first_device(mesh)
    loaded = converters.load(
        str(path),
        load_format=kind.removesuffix("_q8_0"),
        dtype=dtype,
        placing=functools.partial(placement, mesh=mesh),
    )
    crossovers = machine_of(device.platform, device.device_kind).crossovers
    return loaded, arrange(cut_over(loaded.declaration, mesh), loaded.params, crossovers, mesh)[0]


def largest(loaded: Any, arrays: tuple[jax.Array, ...]) -> tuple[int, int]:
    """Bytes of the two largest tensors, and of one device's shards of the two largest."""
    placed = dict(zip(loaded.declaration.specs, arrays, strict=True))
    whole, shards = [], []
    for path, part in checkpoints.tensors(loaded.declaration):
        spec, array = loaded.declaration.specs[path], placed[path]
        whole.append(math.prod(part.shape) * spec.dtype.itemsize)
        share = math.prod(part.shape) / math.prod(spec.shape)
        shards.append(int(share * bytes_on_each([array])))
    return sum(sorted(whole)[-2:]), sum(sorted(shards)[-2:])


def distinct_bytes(arrays: tuple[jax.Array, ...]) -> int:
    """Of all devices' parts; memory that two of them share counts once."""
    parts = [shard.data for array in arrays for shard in array.addressable_shards]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in parts}.values())


def in_use(tp: int, key: str) -> list[int]:
    """A figure of each device's allocator; none of CPUs."""
    found = [device.memory_stats() for device in jax.devices()[:tp]]
    return [stats[key] for stats in found if stats]


def measure(path: Path, kind: str, dtype: str, tp: int) -> dict[str, Any]:
    """One load, in this process, which must be a fresh one."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = checkpoints.write(Path(folder) / "tiny", kind, MODELS["tiny"])
        jax.block_until_ready(load_as_an_engine(tiny, kind, dtype, tp)[1])
    device_before = in_use(tp, "bytes_in_use")
    started = time.perf_counter()
    with PeakMemory(INTERVAL) as memory:
        loaded, arrays = load_as_an_engine(path, kind, dtype, tp)
        jax.block_until_ready(arrays)
        seconds = time.perf_counter() - started
    each = bytes_on_each(arrays)
    on_host = jax.default_backend() == "cpu"
    weights = distinct_bytes(arrays)
    two, two_shards = largest(loaded, arrays)
    excess = memory.bytes - weights if on_host else memory.bytes
    peaks = zip(in_use(tp, "peak_bytes_in_use"), device_before, strict=True)
    devices = [peak - had - each for peak, had in peaks]
    return {
        "seconds": round(seconds, 2),
        "weights_mb": round(weights / MB, 1),
        "largest_mb": round(two / MB, 1),
        "baseline_mb": round(memory.before / MB, 1),
        "host_mb": round(memory.bytes / MB, 1),
        "excess_mb": round(excess / MB, 1),
        "device_mb": [round(size / MB, 1) for size in devices],
        "device_largest_mb": round(two_shards / MB, 1),
        "machine": machine.describe(),
        "ok": excess <= two and all(size <= two_shards for size in devices),
    }


def in_process(stage: str, cpu_devices: int, **options: Any) -> dict[str, Any]:
    """What `stage` printed, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--run", stage]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = dict(os.environ)
    if cpu_devices or stage == "write":
        environment["JAX_PLATFORMS"] = "cpu"
    if cpu_devices:
        flag = f"--xla_force_host_platform_device_count={cpu_devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    child = children.run(command, SECONDS[stage], environment)
    if child.failed:
        print(child.errors[-2000:], file=sys.stderr, flush=True)
        return {"failed": f"{stage}: {child.failed}"}
    return child.lines[-1]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All formats, with each number of devices."""
    found = []
    for kind in args.formats:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            common = {"model": args.model, "formats": kind, "dtype": args.dtype}
            folder = Path(folder) / "checkpoint"
            written = in_process("write", args.cpu_devices, folder=folder, **common)
            for tp in args.tp if "path" in written else ():
                options = {**common, "folder": written["path"], "tp": tp}
                result = in_process("load", args.cpu_devices, **options)
                found.append({"format": kind, "tp": tp, **written, **result})
                del found[-1]["path"]
                shown = {key: value for key, value in found[-1].items() if key != "machine"}
                print(shown, flush=True)
            if "path" not in written:
                found.append({"format": kind, **written})
    return found


COLUMNS = (
    "written_gb", "seconds", "weights_mb", "largest_mb", "host_mb", "excess_mb", "device_mb",
    "device_largest_mb", "ok",
)  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """The results, short."""
    lines = [f"{'format':12}{'tp':>3}" + "".join(f"{name:>18}" for name in COLUMNS)]
    for row in found:
        cells = [row.get("failed", "")] if "failed" in row else [row[name] for name in COLUMNS]
        lines.append(
            f"{row['format']:12}{row.get('tp', ''):>3}" + "".join(f"{cell!s:>18}" for cell in cells)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-1b", choices=sorted(MODELS))
    parser.add_argument(
        "--formats", nargs="*", default=list(checkpoints.FORMATS), choices=checkpoints.FORMATS
    )
    parser.add_argument("--tp", type=int, nargs="*", default=[2], help="devices")
    parser.add_argument("--dtype", default="bfloat16", help="in which the weights are placed")
    parser.add_argument("--cpu-devices", type=int, default=0, help="make so many of a CPU")
    parser.add_argument("--folder", type=Path, help="checkpoints are written into; gone afterwards")
    parser.add_argument("--out", type=Path, help="the JSON goes here")
    parser.add_argument("--run", choices=SECONDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run == "write":
        started = time.perf_counter()
        path = checkpoints.write(args.folder, args.formats[0], MODELS[args.model])
        size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
        seconds = round(time.perf_counter() - started, 2)
        print(
            json.dumps({"path": str(path), "written_gb": round(size / 1e9, 3), "write_s": seconds})
        )
    elif args.run == "load":
        print(json.dumps(measure(args.folder, args.formats[0], args.dtype, args.tp[0])))
    else:
        found = run(args)
        print(f"\n{table(found)}")
        if args.out:
            described = [row.pop("machine") for row in found if "machine" in row]
            result = {**(described or [{}])[0], "benchmark": "loading", "model": args.model}
            result["found"] = found
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
