"""Benchmarks of several devices on a tiny engine: requests have their lengths, nothing is compiled
late."""

from __future__ import annotations

import json

import pytest

from benchmarks import replicas, tensor_parallel
from benchmarks.runs import Case

pytestmark = pytest.mark.usefixtures("kept_programs")
OPTIONS = {
    "max_running_requests": 16, "cuda_graph_bs": (16,), "chunked_prefill_size": 64,
    "context_length": 1024, "max_total_tokens": 16_384, "precompile": True,
}  # fmt: skip


@pytest.mark.long
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


@pytest.mark.long
def test_a_cut_model_is_compared_with_a_whole_one(capsys):
    command = ["--tp", "2", "--model", "tiny", "--rows", "1", "2", "--tokens", "4"]
    options = {**OPTIONS, "cuda_graph_bs": [1, 2]}
    sizes = ["--prompt", "40", "--scale", "0.01", "--engine", json.dumps(options)]
    given = tensor_parallel.arguments().parse_args([*command, *sizes])
    tensor_parallel.start(given)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = tensor_parallel.gathered(2, said)
    assert found["all_reduce"].startswith("psum") and found["platform"] == "cpu"
    assert found["prefill"]["size"] == 40 and found["uniform"]["size"] == 3
    late = [found["decode"][rows]["late_compiles"] for rows in (1, 2)]
    assert [*late, found["uniform"]["late_compiles"]] == [0, 0, 0]
    faster = {**found, "decode": {1: {"ms": found["decode"][1]["ms"] / 2}}}
    assert tensor_parallel.speedups(found, faster) == {"decode 1": 2, "prefill": 1, "uniform": 1}
