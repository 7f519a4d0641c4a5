"""Throughput and latency cases of one model on a single engine, which takes long to start.

    python -m benchmarks.suite --model llama-3.1-8b --out-dir results
    python -m benchmarks.suite --model llama-3.1-8b --cases uniform ragged lat1 --out-dir results

What is measured: benchmarks/offline_throughput.py and benchmarks/latency.py.
"""

from __future__ import annotations

from benchmarks import latency, offline_throughput
from benchmarks.runs import command

BENCHMARKS = [latency.BENCHMARK, offline_throughput.BENCHMARK]

if __name__ == "__main__":
    command(__doc__, BENCHMARKS)
