"""Counters and the progress log, against counts made by hand and values computed in the plain."""

from __future__ import annotations

import bisect
import random

import pytest

from jaxserve.output import stats as stats_module
from jaxserve.output.stats import BOUNDS, Histogram, Stats, Throughput


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stats_module, "time", clock)
    return clock


def test_throughput_is_that_of_the_last_seconds_of_work(clock):
    """Against all steps kept in a list, with their times as if nothing had rested in between."""
    draw = random.Random(0)
    throughput, busy, steps = Throughput(), 0.0, []
    assert throughput.value == 0
    for _ in range(3000):
        if draw.random() < 0.01:
            rest = draw.random() * 100
            clock.now += rest
            throughput.rested(rest)
        took, tokens = draw.choice([0.001, 0.01, 0.05]), draw.randrange(300)
        clock.now += took
        busy += took
        throughput.add(tokens)
        steps.append((busy, tokens))
        window, sample = stats_module.WINDOW_SECONDS, stats_module.SAMPLE_SECONDS
        # the window begins at a sample: at most one sample and one step early
        rates = []
        for length in (window, window + sample + 0.05):
            start = max(busy - length, 0.0)
            tokens_since = sum(n for at, n in steps[-2000:] if at > start)
            rates.append(tokens_since / length if start else tokens_since / busy)
        assert min(rates) * 0.97 <= throughput.value <= max(rates) * 1.03


def test_throughput_of_a_short_run_is_exact(clock):
    throughput = Throughput()
    clock.now += 50
    throughput.rested(50)
    for _ in range(4):
        clock.now += 0.01
        throughput.add(8)
    assert throughput.value == pytest.approx(800)
    clock.now += 500
    throughput.rested(500)
    assert throughput.value == pytest.approx(800)


def test_throughput_forgets(clock):
    throughput = Throughput()
    for tokens in (1, 100):
        for _ in range(300):
            clock.now += 0.1
            throughput.add(tokens)
    assert throughput.value == pytest.approx(1000)
    assert len(throughput._samples) < 150


def test_histogram_buckets():
    draw = random.Random(1)
    values = [10 ** draw.uniform(-6, 4) for _ in range(500)] + list(BOUNDS)
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    ordered = sorted(values)
    upto = [bisect.bisect_right(ordered, bound) for bound in BOUNDS] + [len(values)]
    differences = [b - a for a, b in zip([0, *upto], upto, strict=False)]
    assert histogram.counts == differences
    assert histogram.sum == pytest.approx(sum(values))
    assert list(BOUNDS) == sorted(BOUNDS) and BOUNDS[:4] == (1e-4, 2e-4, 5e-4, 1e-3)


def test_nothing_has_happened_yet():
    counts = Stats().as_dict()
    assert counts["cache_hit_rate"] == counts["host_ms_per_step"] == 0
    assert counts["finished_requests"] == {"stop": 0, "length": 0, "abort": 0, "error": 0}
