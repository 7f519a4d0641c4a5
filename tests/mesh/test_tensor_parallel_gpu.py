"""Two GPUs that share each layer give what one gives, with whichever way of summing."""

from __future__ import annotations

import numpy as np
import pytest

import jaxserve
from jaxserve.parallel import peers
from jaxserve.parallel.peers import Peers
from tests.kernels.support import quiet
from tests.mesh.cases import CASES, logprobs
from tests.prompts import ids

pytestmark = [pytest.mark.gpu, quiet]

OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 512, "max_running_requests": 16,
    "cuda_graph_bs": [1, 16], "chunked_prefill_size": 128, "log_level": "warning",
}  # fmt: skip
CALL = {**CASES["logprobs"], "sampling_params": {"temperature": 0, "max_new_tokens": 40}}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama", head_dim=64, num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def one(folder):
    with jaxserve.Engine(folder, dtype="bfloat16", **OPTIONS) as engine:
        return engine.generate(**CALL)


@pytest.fixture(params=["peer", "psum"])
def way(request, monkeypatch):
    """By which the devices sum, whatever the self-test finds."""
    if request.param == "psum":
        monkeypatch.setattr(peers, "unfit", lambda *_: "not tried")
    else:
        chosen = peers.judged
        monkeypatch.setattr(
            peers, "judged", lambda found, both: with_peers(chosen(found, both), both)
        )
    return request.param


def with_peers(chosen: Peers, both: Peers) -> Peers:
    """The kernels over peer memory, though XLA's collective was faster; not if they were wrong."""
    return both if chosen.reason.endswith("with psum") else chosen


def test_prompts_score_as_on_one_gpu(folder, one, way):
    """In bfloat16, where sums round otherwise: tokens of nearly equal scores may change places, so
    prompts are compared, which all engines read alike."""
    with jaxserve.Engine(folder, dtype="bfloat16", tp_size=2, **OPTIONS) as engine:
        found = engine.generate(**CALL)
        info = engine.get_server_info()
    assert info["all_reduce"].startswith(way) and info["late_compiles"] == 0
    for here, there in zip(found, one, strict=True):
        size = len(here["meta_info"]["input_token_logprobs"]) - 1
        apart = np.abs(np.subtract(logprobs(here)[:size], logprobs(there)[:size]))
        assert apart.mean() < 0.01 and apart.max() < 0.1


def test_deterministic_tokens_do_not_depend_on_the_batch(folder):
    options = {**OPTIONS, "dtype": "bfloat16", "enable_deterministic_inference": True}
    with jaxserve.Engine(folder, tp_size=2, **options) as engine:
        together = ids(engine.generate(**CALL))
        params = CALL["sampling_params"]
        alone = [engine.generate(input_ids=p, sampling_params=params) for p in CALL["input_ids"]]
    assert ids(alone) == together


def test_programs_become_ready_beside_requests(folder, way):
    """Each runs once with the kernels off before it counts: nobody waits for a peer that loads."""
    options = {**OPTIONS, "cuda_graph_bs": [1, 2, 4, 8, 16], "chunked_prefill_size": 512}
    with jaxserve.Engine(
        folder, dtype="bfloat16", tp_size=2, compilation_cache_dir="", **options
    ) as engine:
        while engine.get_server_info()["programs_compiling"]:
            engine.generate(**CASES["seeded"])
        info = engine.get_server_info()
    assert info["late_compiles"] == 0 and info["all_reduce"].startswith(way)
