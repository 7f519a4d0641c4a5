"""The JSON files of benchmarks/results/ as figures of devices."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.machine import short_name
from benchmarks.runs import variant

Result = dict[str, Any]
KINDS = (
    "offline_throughput",
    "latency",
    "startup",
    "host_overhead",
    "kernels",
    "quality",
    "cpu",
    "load",
    "load_test",
    "interference",
    "hidden_states",
    "images",
    "profile",
    "peer",
)
"""What a result file may be. Profiles are not shown: they are long, and read by themselves."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One case: output tokens/s, or milliseconds a token, and the peer's where it was measured on
    the same device."""

    result: Result
    peer: Result

    @property
    def model(self) -> str:
        """Quantized ones are models of their own."""
        return " ".join([self.result["model"], *variant(self.result.get("engine", {}))])

    @property
    def throughput(self) -> bool:
        return self.result["benchmark"] == "offline_throughput"

    @property
    def case(self) -> str:
        """Files of before 2026-11-25 have a number of rows instead of a latency case."""
        rows = "lat{rows}" + ("_s" if self.result.get("sampled") else "")
        return self.result.get("case") or rows.format(**self.result)

    @property
    def value(self) -> float:
        return self.result["output_tokens_per_s" if self.throughput else "ms_per_token"]

    @property
    def theirs(self) -> Result:
        return self.peer.get("models", {}).get(self.model, {}).get(self.case, {})

    @property
    def their_value(self) -> float | None:
        return self.theirs.get("output_tokens_per_s" if self.throughput else "ms_per_token")

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        if self.their_value is None:
            return None
        return self.value / self.their_value if self.throughput else self.their_value / self.value

    @property
    def share(self) -> float:
        name = "share_of_floor"
        return self.result[name if name in self.result else "share_of_copy_bandwidth"]

    @property
    def spread(self) -> float | None:
        runs = self.result.get("seconds" if self.throughput else "ms_per_token_runs")
        return None if runs is None else (max(runs) - min(runs)) / statistics.median(runs)


@dataclasses.dataclass(frozen=True)
class Device:
    """All results of one machine, by kind, and the peer measured on the same device."""

    name: str
    results: dict[str, list[Result]]
    peer: Result

    @property
    def short(self) -> str:
        return short_name(next(r for results in self.results.values() for r in results))

    @property
    def figures(self) -> list[Figure]:
        """By model, in the order of workloads.CASES."""
        results = self.of("latency") + self.of("offline_throughput")
        found = [Figure(result, self.peer) for result in results]
        return sorted(found, key=lambda f: (f.model, workloads.CASES.index(f.case)))

    @property
    def compared(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.ratio is not None]

    def of(self, kind: str) -> list[Result]:
        return self.results.get(kind, [])


def read(folder: Path) -> list[Device]:
    """The devices of all result files in `folder`, GPUs first. ValueError: a file is no known
    result, or two files have the same case."""
    devices: dict[str, Device] = {}
    peers: dict[str, Result] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "times" in result:
            result = {**result["machine"], "benchmark": "kernels", **result}
        kind = result.get("benchmark")
        if kind not in KINDS:
            raise ValueError(f"{path.name}: benchmark={kind!r} is none of {', '.join(KINDS)}")
        if kind == "peer":
            peers[result["device"]] = result
            continue
        cpu = result["platform"] == "cpu"
        name = f"CPU, {result['cpus']} cores" if cpu else result["device"]
        device = devices.setdefault(name, Device(name, {}, {}))
        device.results.setdefault(kind, []).append(result)
        if kind in ("offline_throughput", "latency"):
            key = (name, Figure(result, {}).model, Figure(result, {}).case)
            if key in seen:
                raise ValueError(f"{seen[key]} and {path.name} are both {' '.join(key)}")
            seen[key] = path.name
    placed = [dataclasses.replace(d, peer=peers.get(d.name, {})) for d in devices.values()]
    return sorted(placed, key=lambda d: (d.name.startswith("CPU"), d.name))
