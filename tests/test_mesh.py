"""An engine on another device than the first: what it keeps is there, its results are the same."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jaxserve.parallel.mesh import abstract, first_device, mesh_of, replicated
from tests.cpu_devices import on_cpu_devices

ROOT = Path(__file__).parent.parent
PLACED = """
import collections, gc, json, sys, tempfile
from pathlib import Path
import jax
import jax.numpy as jnp
import jaxserve
from jaxserve.compat import without_compilation_cache
from jaxserve.folders import PrivateFolder
from jaxserve.parallel.mesh import abstract, mesh_of, replicated
from jaxserve.step.stored import StoredPrograms
from tests.prompts import SMALL, text

OPTIONS = {
    **SMALL, "max_total_tokens": 640, "enable_hierarchical_cache": True, "hicache_ratio": 8.0,
    "disable_radix_cache": False, "cuda_graph_bs": [8], "chunked_prefill_size": 64,
}


def places():
    gc.collect()
    return collections.Counter(d.id for a in jax.live_arrays() for d in a.devices())


def run(device):
    with jaxserve.Engine(sys.argv[1], base_gpu_id=device, **OPTIONS) as engine:
        before = places()
        results = []
        for seed in (1, 2, 3, 1):  # the last one's prefix comes from the host
            results += engine.generate(
                input_ids=[text(seed, 150), text(seed + 10, 40)],
                sampling_params={"max_new_tokens": 12, "temperature": 0.7, "sampling_seed": 4,
                                 "n": 2, "logit_bias": {"7": 1.5}, "ignore_eos": True},
                return_logprob=True, logprob_start_len=0, top_logprobs_num=2,
            )
        info = engine.get_server_info()
        arrays = jax.tree.leaves(engine._loop._runner._arrays)
        shardings = {str(a.sharding) for a in arrays}
        after = places()
    report = [[r["output_ids"], r["meta_info"]["output_token_logprobs"]] for r in results]
    return report, before, after, sorted(shardings), info


def stored(device, folder):
    mesh = mesh_of(jax.devices()[device])
    spec = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=replicated(mesh))
    programs = StoredPrograms(PrivateFolder(folder), mesh, ())
    name = programs.name("next", (spec,), (), {})
    if device == 3 and programs.load(name, {}) is None:
        with without_compilation_cache():
            programs.store(name, jax.jit(lambda x: x + 1).lower(spec).compile(), 0)
    program, _ = programs.load(name, {})
    out = program(jax.numpy.arange(4, dtype=jnp.int32, device=replicated(mesh)))
    return name, [d.id for d in out.devices()], out.tolist()


third = run(3)
first = run(0)
with tempfile.TemporaryDirectory() as folder:
    kept = [stored(device, Path(folder) / "whole") for device in (3, 3, 0)]
print(json.dumps({"third": third, "first": first, "stored": kept}, default=str))
"""


@pytest.fixture(scope="module")
def placed(tiny_models):
    """What an engine on the fourth of eight devices does, and one on the first."""
    printed = on_cpu_devices(8, "-c", PLACED, tiny_models("llama", num_hidden_layers=1))
    return json.loads(printed.splitlines()[-1])


def test_an_engine_keeps_everything_on_its_device(placed):
    for number, name in ((3, "third"), (0, "first")):
        _, before, after, shardings, info = placed[name]
        assert set(before) == set(after) == {str(number)}
        assert len(shardings) == 1 and "'data': 1, 'tensor': 1" in shardings[0]
        assert info["late_compiles"] == 0


def test_its_results_are_those_of_another_device(placed):
    assert placed["third"][0] == placed["first"][0]


def test_a_stored_program_is_for_any_device_of_its_kind(placed):
    """It runs where it is loaded, not where it was compiled."""
    (name, *ran), again, other = placed["stored"]
    assert again == [name, *ran] and ran == [[3], [1, 2, 3, 4]]
    assert other == [name, [0], [1, 2, 3, 4]]


def test_shapes_take_the_sharding_they_are_given():
    mesh = mesh_of(jax.devices("cpu")[0])
    spec = abstract({"a": jax.ShapeDtypeStruct((2, 3), "int8")}, replicated(mesh))["a"]
    assert (spec.shape, spec.dtype, spec.sharding) == ((2, 3), "int8", replicated(mesh))
    assert first_device(mesh) == jax.devices("cpu")[0]
    assert dict(mesh.shape) == {"data": 1, "tensor": 1}
    assert replicated(mesh, "pinned_host").memory_kind == "pinned_host"
