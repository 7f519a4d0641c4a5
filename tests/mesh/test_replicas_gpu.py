"""Two GPUs: programs of one run on the other, and a replica's requests move between them."""

from __future__ import annotations

import collections
import threading

import jax
import pytest

import jaxserve
from tests.kernels.support import quiet
from tests.mesh.test_replica_failures import break_down, failed, streamed
from tests.prompts import ids, text

pytestmark = [pytest.mark.gpu, quiet]

OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 512, "max_running_requests": 8,
    "chunked_prefill_size": 128, "enable_deterministic_inference": True, "log_level": "info",
}  # fmt: skip
"""Bitwise the same tokens, whatever else is in a batch."""
PARAMS = {"temperature": 0.8, "sampling_seed": 3, "max_new_tokens": 60, "ignore_eos": True}
PROMPTS = [text(seed, 20 + 25 * seed) for seed in range(12)]


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama", head_dim=64)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def expected(folder, programs):
    with jaxserve.Engine(folder, compilation_cache_dir=programs, **OPTIONS) as engine:
        yield ids(engine.generate(input_ids=PROMPTS, sampling_params=PARAMS))


def how(caplog):
    """How programs came to be, and warnings."""
    ours = [record for record in caplog.records if record.name.startswith("jaxserve.step")]
    warned = [record.getMessage() for record in ours if record.levelname == "WARNING"]
    words = (record.getMessage().split()[0] for record in ours if record.levelname == "INFO")
    return collections.Counter(word for word in words if word in ("compiled", "loaded")), warned


@pytest.mark.parametrize("where", [{"base_gpu_id": 1}, {"dp_size": 2}], ids=["second", "both"])
def test_what_one_gpu_compiled_runs_on_the_other(folder, programs, expected, caplog, where):
    caplog.set_level("INFO", logger="jaxserve")
    options = {**OPTIONS, "compilation_cache_dir": programs, **where}
    with jaxserve.Engine(folder, **options) as engine:
        assert ids(engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)) == expected
        info = engine.get_server_info()
    made, warned = how(caplog)
    assert made == {"loaded": info["programs"]} and not warned
    assert info["late_compiles"] == 0


def test_replicas_without_a_folder_compile_once(folder, expected, caplog):
    caplog.set_level("INFO", logger="jaxserve")
    options = {**OPTIONS, "compilation_cache_dir": "", "dp_size": 2}
    with jaxserve.Engine(folder, **options) as engine:
        assert ids(engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)) == expected
        info = engine.get_server_info()
    made, warned = how(caplog)
    assert made == {"compiled": info["programs"] // 2, "loaded": info["programs"] // 2}
    assert not warned and info["late_compiles"] == 0
    assert [part["devices"] for part in info["replicas"]] == [[str(d)] for d in jax.devices()[:2]]


def test_requests_move_to_the_other_gpu(folder, programs, expected):
    options = {**OPTIONS, "compilation_cache_dir": programs, "dp_size": 2}
    with jaxserve.Engine(folder, **{**options, "log_level": "critical"}) as engine:
        begun = threading.Event()
        loop = break_down(engine, 0, 10, begun)
        chunks = streamed(engine, PARAMS, begun, PROMPTS)
        loop._thread.join(60)
        info = engine.get_server_info()
    assert failed(info) == [True, False] and info["late_compiles"] == 0
    for seen, whole in zip(chunks, expected, strict=True):
        lengths = [len(chunk["output_ids"]) for chunk in seen]
        assert lengths == sorted(set(lengths)) and seen[-1]["output_ids"] == whole
