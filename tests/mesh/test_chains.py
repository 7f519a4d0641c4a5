"""Chains and guides on several devices give what they give on one."""

from __future__ import annotations

import pytest

import jaxserve
from tests import test_chains, test_guides
from tests.marks import long_but
from tests.mesh.cases import CASES, OPTIONS, SEEDED
from tests.prompts import ids
from tests.test_guides import guided  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("kept_programs")

MESHES = {"dp": {"dp_size": 2}, "both": {"tp_size": 2, "dp_size": 2}}
SIZES = {"precompile": True, "chunked_prefill_size": 64, "max_running_requests": 2}
POINTS = ("layer.0.attn", "layer.0.heads", "layer.1.attn_out", "layer.1.mlp_out")
HOOK = ("scaled", dict.fromkeys(POINTS, lambda x, p, c: x * p["by"] + c.position), {"by": 0.5})
HOOKED = {**CASES["seeded"], "sampling_params": {**SEEDED, "hook": "scaled"}}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def expected(folder):
    """Tokens of one device: without a chain, and with a hook."""
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        plain = ids(engine.generate(**CASES["seeded"]))
        engine.register_hook(*HOOK)
        return plain, ids(engine.generate(**HOOKED))


@pytest.mark.parametrize("mesh", long_but(MESHES, "both"))
def test_the_tokens_of_one_device(folder, expected, mesh, guided):  # noqa: F811
    prompts = [test_chains.text(seed, 9 + 11 * seed) for seed in range(6)]
    with jaxserve.Engine(folder, **{**OPTIONS, **SIZES}, **MESHES[mesh]) as engine:
        for fuse in (False, True):
            test_chains.register(engine, fuse=fuse)
            found = engine.generate(input_ids=prompts, sampling_params=test_chains.asks(12))
            assert ids(found) == [test_chains.expected(prompt, 12) for prompt in prompts]
        case = CASES["seeded"]
        params = {**case["sampling_params"], "transform": "same"}
        assert ids(engine.generate(**{**case, "sampling_params": params})) == expected[0]
        engine.register_hook(*HOOK)
        assert ids(engine.generate(**HOOKED)) == expected[1] != expected[0]
        guided(*[test_guides.Masking, test_guides.Editing] * 3)
        found = engine.generate(input_ids=prompts, sampling_params=test_guides.asks(7))
        assert ids(found) == [test_guides.expected(prompt, 7) for prompt in prompts]
        info = engine.get_server_info()
        assert len({result["meta_info"].get("dp_rank") for result in found}) == info["dp_size"]
        assert info["late_compiles"] == 0
