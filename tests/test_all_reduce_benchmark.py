"""benchmarks.all_reduce: its programs lower for GPUs, and what it counts is wrong when it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import all_reduce, all_reduce_stress
from pallas_kernels import Device, compat
from pallas_kernels.all_reduce.workspace import COMM_WORDS
from tests.cpu_devices import on_cpu_devices
from tests.kernels.support import quiet, shape_list
from tests.marks import long

pytestmark = quiet
ROOT = Path(__file__).parent.parent
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)


def test_on_two_cpu_devices(tmp_path):
    """Times of the XLA form and a few exact sums."""
    out = tmp_path / "result.json"
    options = ["--stages", "times", "stress", "--stress", "30", "--seed", "3", "--out", str(out)]
    printed = on_cpu_devices(2, "-m", "benchmarks.all_reduce", *options)
    found: list[dict[str, Any]] = json.loads(out.read_text())["found"]
    assert [x.get("kind") for x in found] == ["none", "psum", None, None]
    assert found[1]["us_layer"] > 0 and "1x256" in printed and "psum (NCCL)" in printed
    stress = found[3]
    assert stress["all_reduces"] == 36 and stress["wrong"] == 0 and stress["shapes"] == 3


@pytest.mark.long
def test_sums_that_are_not_are_counted():
    counted = on_cpu_devices(
        2,
        "-c",
        "import json\n"
        "from benchmarks import all_reduce, all_reduce_stress\n"
        "mesh = all_reduce.mesh_of(2)\n"
        "all_reduce_stress.all_reduce = lambda x, comm, axis_name: x\n"
        "print(json.dumps(all_reduce_stress.run(mesh, None, 12, 3, 60)))",
    )
    # [3, 128] is the shape without a norm, 4 times on 2 devices; some parts are 0
    assert 4 * 2 * 3 * 128 * 0.8 < json.loads(counted.splitlines()[-1])["wrong"] <= 4 * 2 * 3 * 128


def test_pauses_are_few_and_up_to_a_second():
    micros = all_reduce_stress.pauses(np.random.default_rng(0), 50, 2, 128)
    assert micros.dtype == np.int32 and micros.shape == (50, 2, 128)
    pauses = micros[micros > 300]
    assert 5 <= len(pauses) <= all_reduce_stress.LONG_PAUSES and pauses.max() <= 1_000_000
    assert 0.01 < (micros > 0).mean() < 0.03


@pytest.mark.parametrize("ranks", [2, long(4)])
def test_the_stress_lowers_for_cuda(monkeypatch, ranks):
    monkeypatch.setattr("pallas_kernels.registry.current_device", lambda: H100)
    mesh = compat.abstract_gpus({"tensor": ranks})
    integers = [(ranks, 8), (), (ranks,), (ranks, COMM_WORDS)]
    shapes = shape_list([(shape, jnp.int32) for shape in integers])
    loop = all_reduce_stress.loop(mesh, all_reduce_stress.SHAPES, 8, pausing=True)
    text = compat.lower_for_cuda(loop, *shapes, mesh=mesh)
    assert text.count("stablehlo.while") == 1 and "mosaic_gpu" in text
    assert "stablehlo.all_reduce" not in text  # twelve kernels over peer memory


@pytest.mark.parametrize("kind", all_reduce.KINDS)
def test_the_chains_lower_for_cuda(monkeypatch, kind):
    monkeypatch.setattr("pallas_kernels.registry.current_device", lambda: H100)
    mesh = compat.abstract_gpus({"tensor": 2})
    wide = ((64, 4096), jnp.bfloat16)
    kernels = ((2, all_reduce.INNER, 4096), jnp.bfloat16)
    comm = ((2, COMM_WORDS), jnp.int32)
    shapes = shape_list([wide, wide, kernels, ((4096,), jnp.bfloat16), comm])
    text = compat.lower_for_cuda(all_reduce.chain(mesh, kind, 2, 2), *shapes, mesh=mesh)
    assert ("stablehlo.all_reduce" in text) == (kind == "psum")
    assert ("mosaic_gpu" in text) == (kind in ("peer", "two_shot", "fused"))
    assert ("@add_norm" in text) == (kind != "fused")
    assert text.count("stablehlo.dot_general") == 2
