"""Random calls from threads and tasks with failures injected: benchmarks/load_test.py."""

from __future__ import annotations

import pytest

from benchmarks.load_faults import STEP_KINDS, TEXT_KINDS
from benchmarks.load_test import MIB, Load, run

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    "options",
    [
        {"max_total_tokens": 1024, "num_continuous_decode_steps": 4},
        {"disable_overlap_schedule": True, "chunked_prefill_size": 64},
    ],
    ids="-".join,
)
def test_failures_cost_what_they_may_and_nothing_is_left(tiny_models, options):
    # programs are compiled as they are needed, which takes memory: that is the longer test's matter
    load = Load(600, every=20, text_rate=5e-3, bound=60, cases=100, growth=1024 * MIB)
    result = run(tiny_models("llama"), load, {**options, "precompile": False})
    assert result["violations"] == []
    faults = result["faults"]
    assert all(faults[kind]["injected"] for kind in STEP_KINDS)
    assert sum(faults[kind]["injected"] for kind in TEXT_KINDS) > 0
    assert result["retractions"] > 0
    outcomes = result["requests_by_outcome"]
    assert {"wait", "stream", "close", "drop", "cancel", "timeout", "refused"} <= outcomes.keys()
    assert outcomes["of these aborted"] > 0


def test_3000_requests_leave_no_memory_behind(tiny_models):
    load = Load(3_000, growth=12 * MIB)
    result = run(tiny_models("llama"), load)
    assert result["violations"] == []
    assert result["rss_mib"]["100%"] - result["rss_mib"]["25%"] < load.growth / MIB
