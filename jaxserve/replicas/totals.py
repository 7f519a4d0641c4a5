"""The counters of several replicas as those of one engine. No jax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COUNTED = (
    "pages_moved_out",
    "pages_moved_in",
    "images_encoded",
    "late_compiles",
    "programs_untimed",
    "compile_seconds",
    "extend_steps",
    "mixed_steps",
    "decode_steps",
    "generated_tokens",
    "prompt_tokens",
    "cached_tokens",
    "cached_host_tokens",
    "retractions",
    "finished_requests",
    "latencies",
    "host_seconds",
)
"""Since the start: sums over all replicas, those that have failed included."""
PRESENT = (
    "num_pages",
    "num_used_pages",
    "available_tokens",
    "cached_prefix_tokens",
    "num_host_pages",
    "num_used_host_pages",
    "max_total_num_tokens",
    "max_running_requests",
    "programs",
    "programs_compiling",
    "num_running",
    "num_waiting",
    "memory_usage",
    "last_gen_throughput",
)
"""Now: sums over those that run."""
EQUAL = ("page_size", "num_continuous_decode_steps", "context_length", "all_reduce")
"""The same for all."""
LADDERS = ("decode_buckets", "extend_buckets")
"""Those that every replica has."""


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """rows: one of each replica, as `Replica.report` makes it; at least one is "ready"."""
    ready = [row for row in rows if row["status"] == "ready"]
    counted = [row for row in rows if "generated_tokens" in row]
    result = {key: ready[0][key] for key in EQUAL}
    result |= {key: _sum(row[key] for row in counted) for key in COUNTED}
    result |= {key: _sum(row[key] for row in ready) for key in PRESENT}
    for key in LADDERS:
        result[key] = [size for size in ready[0][key] if all(size in row[key] for row in ready)]
    steps = result["extend_steps"] + result["decode_steps"]
    result["token_usage"] = result["num_used_pages"] / result["num_pages"]
    result["cache_hit_rate"] = result["cached_tokens"] / max(result["prompt_tokens"], 1)
    result["host_ms_per_step"] = 1e3 * sum(result["host_seconds"].values()) / max(steps, 1)
    return result


def _sum(values: Iterable[Any]) -> Any:
    """Of numbers; of dicts by key, of lists by place. A histogram's bounds are the same for all."""
    first, *others = values
    if isinstance(first, dict):
        return {
            key: each if key == "bounds" else _sum([each, *(other[key] for other in others)])
            for key, each in first.items()
        }
    if isinstance(first, list):
        return [_sum(column) for column in zip(first, *others, strict=True)]
    return sum(others, first)
