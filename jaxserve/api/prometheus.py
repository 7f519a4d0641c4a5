"""The engine's counters for Prometheus, read when they are scraped. Needs prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

PREFIX = "jaxserve_"
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
    so: `jaxserve_up` is 0."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]], model_name: str):
        self._stats = stats
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats()
        except (EngineDeadError, EngineShutdownError):
            yield self._gauge("up", "Whether the engine runs", 0)
            return
        yield self._gauge("up", "Whether the engine runs", 1)
        for name, (key, text) in GAUGES.items():
            yield self._gauge(name, text, stats[key])
        for name, (key, text) in COUNTERS.items():
            yield self._counter(name, text, "", {"": stats[key]})
        steps = {kind: stats[f"{kind}_steps"] for kind in ("extend", "decode")}
        yield self._counter("steps", "Steps queued on the device", "kind", steps)
        yield self._counter(
            "finished_requests", "Requests that ended", "reason", stats["finished_requests"]
        )
        yield self._counter(
            "host_seconds", "Python time of the engine thread", "phase", stats["host_seconds"]
        )
        for name, (key, text) in HISTOGRAMS.items():
            yield self._histogram(name, text, stats["latencies"][key])

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """A counter with one more label, or none if `label` is empty."""
        labels = ["model_name", *([label] if label else [])]
        family = CounterMetricFamily(PREFIX + name, text, labels=labels)
        for value, count in values.items():
            family.add_metric([self._model_name, *([value] if label else [])], count)
        return family

    def _histogram(self, name: str, text: str, values: Mapping[str, Any]) -> Metric:
        bounds = [*map(str, values["bounds"]), "+Inf"]
        buckets = list(zip(bounds, accumulate(values["counts"]), strict=True))
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], buckets, values["sum"])
        return family
