"""benchmarks.replicas on a tiny engine: every request has its length, nothing is compiled late."""

from __future__ import annotations

from benchmarks import replicas
from benchmarks.runs import Case

OPTIONS = {
    "max_running_requests": 16, "cuda_graph_bs": (16,), "chunked_prefill_size": 64,
    "context_length": 1024, "max_total_tokens": 16_384, "precompile": True,
}  # fmt: skip


def test_replicas_are_compared_with_one():
    case = Case("tiny", "uniform", repeats=1, scale=0.02, options=OPTIONS)
    found = [replicas.measure(case, count, replicas.WAYS) for count in (1, 2)]
    assert [result["more"]["requests"] for result in found] == [5, 10]
    assert [result["split"]["requests"] for result in found] == [5, 5]
    assert all(steps > 0 for steps in found[1]["more"]["steps_of_each"])
    assert found[1]["pinned"]["steps_of_each"][1] == 0
    rows = replicas.compared(found)
    assert [(row["replicas"], row["way"]) for row in rows] == [
        (count, way) for count in (1, 2) for way in replicas.WAYS
    ]
    assert rows[0]["scaling"] == rows[0]["of_ideal"] == 1
    assert rows[3]["of_ideal"] == round(
        found[1]["more"]["output_tokens_per_s"] / found[0]["more"]["output_tokens_per_s"] / 2, 3
    )
    assert all(row["late_compiles"] == 0 for row in rows)
