"""The engine's counters for Prometheus, read when they are scraped. Needs prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxserve.errors import EngineDeadError, EngineShutdownError

PREFIX, REPLICA_PREFIX = "jaxserve_", "jaxserve_replica_"
GAUGES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "num_running_reqs": ("num_running", "Requests that run"),
        "num_queue_reqs": ("num_waiting", "Requests that wait"),
        "num_pages": ("num_pages", "KV pages"),
        "num_used_pages": ("num_used_pages", "KV pages in use"),
        "num_host_pages": ("num_host_pages", "Pages of host memory for evicted KV"),
        "num_used_host_pages": ("num_used_host_pages", "Those that hold some"),
        "token_usage": ("token_usage", "Share of the KV pages in use"),
        "max_total_num_tokens": ("max_total_num_tokens", "Tokens that the KV pages hold"),
        "cache_hit_rate": ("cache_hit_rate", "Cached prompt tokens of all, since the start"),
        "gen_throughput": ("last_gen_throughput", "Output tokens a second over recent work"),
        "startup_seconds": ("startup_time", "How long the engine took to start"),
    }
)
"""Name -> (key of the engine's counters, help)."""
COUNTERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests"),
        "cached_tokens": ("cached_tokens", "Those of them found in the prefix cache"),
        "cached_host_tokens": ("cached_host_tokens", "Those of the cached that were on the host"),
        "generation_tokens": ("generated_tokens", "Output tokens"),
        "retractions": ("retractions", "Times a request was taken off the device for its pages"),
        "late_compiles": ("late_compiles", "Programs compiled while requests waited for them"),
        "compile_seconds": ("compile_seconds", "Time spent on compiling or loading programs"),
    }
)
HISTOGRAMS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "queue_time_seconds": ("queue_time", "From submission to the first step"),
        "time_to_first_token_seconds": ("time_to_first_token", "From the call to the first token"),
        "time_per_output_token_seconds": (
            "time_per_output_token",
            "Mean time between a request's tokens",
        ),
        "e2e_request_latency_seconds": ("e2e_latency", "From the call to the last token"),
    }
)
"""Of finished requests, aborted and failed ones excluded."""


def registry(stats: Callable[[], Mapping[str, Any]], model_name: str) -> CollectorRegistry:
    """A registry of its own for one engine. stats: EngineLoop.stats. model_name: a label of
    all metrics."""
    result = CollectorRegistry()
    result.register(EngineCollector(stats, model_name))
    return result


class EngineCollector(Collector):
    """Asks the engine for its counters at each scrape. Of an engine that has ended it only says
    so: `jaxserve_up` is 0. Of several replicas there are the sums, and under names of their own
    (`jaxserve_replica_...`, with a label `dp_rank`) the parts."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]], model_name: str):
        self._stats = stats
        self._model = {"model_name": model_name}

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats()
        except (EngineDeadError, EngineShutdownError):
            yield _up(PREFIX, [(self._model, 0)])
            return
        yield _up(PREFIX, [(self._model, 1)])
        yield from _families(PREFIX, [(self._model, stats)])
        rows = [
            ({**self._model, "dp_rank": str(row["dp_rank"])}, row)
            for row in stats.get("replicas", ())
        ]
        if rows:
            yield _up(REPLICA_PREFIX, [(labels, row["status"] == "ready") for labels, row in rows])
            running = [(labels, row) for labels, row in rows if row["status"] == "ready"]
            yield from _families(REPLICA_PREFIX, running)


Labels = dict[str, str]


def _up(prefix: str, rows: list[tuple[Labels, float]]) -> Metric:
    return _gauge(prefix + "up", "Whether the engine runs", rows)


def _families(prefix: str, rows: list[tuple[Labels, Mapping[str, Any]]]) -> Iterator[Metric]:
    """All metrics of engines, or replicas, each with labels of its own."""
    for name, (key, text) in GAUGES.items():
        yield _gauge(prefix + name, text, [(labels, stats[key]) for labels, stats in rows])
    for name, (key, text) in COUNTERS.items():
        values = [(labels, {"": stats[key]}) for labels, stats in rows]
        yield _counter(prefix + name, text, "", values)
    steps = [
        (labels, {kind: stats[f"{kind}_steps"] for kind in ("extend", "decode")})
        for labels, stats in rows
    ]
    yield _counter(prefix + "steps", "Steps queued on the device", "kind", steps)
    ended = [(labels, stats["finished_requests"]) for labels, stats in rows]
    yield _counter(prefix + "finished_requests", "Requests that ended", "reason", ended)
    seconds = [(labels, stats["host_seconds"]) for labels, stats in rows]
    yield _counter(prefix + "host_seconds", "Python time of the engine thread", "phase", seconds)
    for name, (key, text) in HISTOGRAMS.items():
        values = [(labels, stats["latencies"][key]) for labels, stats in rows]
        yield _histogram(prefix + name, text, values)


def _gauge(name: str, text: str, rows: list[tuple[Labels, float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(rows[0][0]))
    for labels, value in rows:
        family.add_metric(list(labels.values()), value)
    return family


def _counter(
    name: str, text: str, label: str, rows: Sequence[tuple[Labels, Mapping[str, float]]]
) -> Metric:
    """A counter with one more label, or none if `label` is empty."""
    family = CounterMetricFamily(name, text, labels=[*rows[0][0], *([label] if label else [])])
    for labels, values in rows:
        for value, count in values.items():
            family.add_metric([*labels.values(), *([value] if label else [])], count)
    return family


def _histogram(name: str, text: str, rows: list[tuple[Labels, Mapping[str, Any]]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=list(rows[0][0]))
    for labels, values in rows:
        bounds = [*map(str, values["bounds"]), "+Inf"]
        buckets = list(zip(bounds, accumulate(values["counts"]), strict=True))
        family.add_metric(list(labels.values()), buckets, values["sum"])
    return family
