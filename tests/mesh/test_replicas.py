"""Two and more replicas give what one engine gives, wherever requests run."""

from __future__ import annotations

import asyncio
import collections
import gc

import jax
import numpy as np
import pytest
from prometheus_client import generate_latest

import jaxserve
from jaxserve.errors import EngineShutdownError, InvalidRequestError, ProfileError
from jaxserve.step.shared import Shared
from tests import inside
from tests.marks import long_but
from tests.mesh.cases import CASES, LONG, OPTIONS, PROMPTS, SEEDED, logprobs
from tests.prompts import GREEDY, ids, text

pytestmark = pytest.mark.usefixtures("kept_programs")
MODES = {
    "tight": {
        "max_total_tokens": 640, "max_running_requests": 8, "enable_hierarchical_cache": True,
        "hicache_ratio": 4.0,
    },
    "deterministic": {"enable_deterministic_inference": True, "cuda_graph_bs": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def expected(folder):
    """What one engine makes of each case."""
    with jaxserve.Engine(folder, **OPTIONS) as engine:
        yield {name: engine.generate(**case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def engine(folder):
    with jaxserve.Engine(folder, dp_size=2, **OPTIONS) as engine:
        yield engine
        assert engine.get_server_info()["late_compiles"] == 0


def ranks(results):
    return [result["meta_info"]["dp_rank"] for result in results]


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_of_one_engine(engine, expected, name):
    results = engine.generate(**CASES[name])
    assert ids(results) == ids(expected[name])
    assert set(ranks(results)) == {0, 1}
    if name == "logprobs":
        for mine, other in zip(results, expected[name], strict=True):
            np.testing.assert_allclose(logprobs(mine), logprobs(other), atol=1e-4)


@pytest.mark.parametrize("mode", long_but(MODES, "tight"))
def test_in_every_mode(folder, mode):
    """Retraction and host memory; one shape of programs."""
    options = {**OPTIONS, **MODES[mode]}
    many = {
        "input_ids": [text(seed, 150) for seed in range(12)],
        "sampling_params": {**SEEDED, "max_new_tokens": 60},
    }
    runs = []
    for dp_size in (1, 2):
        with jaxserve.Engine(folder, dp_size=dp_size, **options) as engine:
            results = ids(engine.generate(**many)) + ids(engine.generate(**many))
            results += ids(engine.generate(**CASES["samples"]))
            runs.append(results)
            info = engine.get_server_info()
            assert info["late_compiles"] == 0
            if mode == "tight":
                assert info["retractions"] > 0 and info["pages_moved_out"] > 0
    assert runs[0] == runs[1]


def test_samples_of_a_prompt_stay_together(engine):
    results = engine.generate(input_ids=PROMPTS[:4], sampling_params={**SEEDED, "n": 3})
    chosen = ranks(results)
    assert all(len(set(chosen[start : start + 3])) == 1 for start in range(0, 12, 3))


@pytest.mark.parametrize("name", ["routed_dp_rank", "data_parallel_rank"])
def test_a_call_can_be_pinned(engine, name):
    for rank in (0, 1, 1):
        results = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, **{name: rank})
        assert set(ranks(results)) == {rank}
    for rank in (-1, 2, "1", 0.5):
        with pytest.raises(InvalidRequestError, match=name):
            engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, **{name: rank})
    with pytest.raises(InvalidRequestError, match="routed_dp_rank=0 and data_parallel_rank=1"):
        engine.generate(
            input_ids=PROMPTS[0], sampling_params=GREEDY, routed_dp_rank=0, data_parallel_rank=1
        )


def test_a_prompt_goes_where_its_prefix_is(engine):
    prefix = text(77, 200)
    engine.generate(input_ids=prefix, sampling_params=GREEDY, routed_dp_rank=1)
    for seed in range(4):
        result = engine.generate(input_ids=prefix + text(seed, 10), sampling_params=GREEDY)
        assert result["meta_info"]["dp_rank"] == 1
        assert result["meta_info"]["cached_tokens"] >= 192
    salted = engine.generate(input_ids=prefix, sampling_params=GREEDY, cache_salt="other")
    assert salted["meta_info"]["dp_rank"] == 0 and salted["meta_info"]["cached_tokens"] == 0
    assert engine.flush_cache().success
    again = engine.generate(input_ids=prefix, sampling_params=GREEDY)
    assert again["meta_info"]["dp_rank"] == 0 and again["meta_info"]["cached_tokens"] == 0
    assert again["output_ids"] == salted["output_ids"]


def test_counters_are_each_ones_and_their_sums(engine):
    engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    info = engine.get_server_info()
    parts = info["replicas"]
    assert [part["dp_rank"] for part in parts] == [0, 1]
    assert [part["devices"] for part in parts] == [[str(d)] for d in jax.devices()[:2]]
    for key in ("generated_tokens", "prompt_tokens", "decode_steps", "num_pages", "programs"):
        assert info[key] == sum(part[key] for part in parts) > 0
        assert all(part[key] > 0 for part in parts)
    counts = [part["latencies"]["e2e_latency"]["counts"] for part in parts]
    assert info["latencies"]["e2e_latency"]["counts"] == np.sum(counts, axis=0).tolist()
    assert (
        info["latencies"]["e2e_latency"]["bounds"] == parts[0]["latencies"]["e2e_latency"]["bounds"]
    )
    assert info["finished_requests"]["length"] == sum(
        part["finished_requests"]["length"] for part in parts
    )
    assert (info["dp_size"], info["tp_size"], len(info["internal_states"])) == (2, 1, 2)
    assert info["num_running"] == info["num_waiting"] == info["num_used_pages"] == 0
    scraped = generate_latest(engine.metrics).decode()
    model = f'model_name="{engine.server_args.model_path}"'
    for rank, part in enumerate(parts):
        count = float(part["generated_tokens"])
        line = f'jaxserve_replica_generation_tokens_total{{dp_rank="{rank}",{model}}} {count}'
        assert line in scraped
        assert f'jaxserve_replica_up{{dp_rank="{rank}",{model}}} 1.0' in scraped
    assert (
        f"jaxserve_generation_tokens_total{{{model}}} {float(info['generated_tokens'])}" in scraped
    )


def test_streams_and_coroutines(engine, expected):
    async def one(number):
        params = {**SEEDED, "stream_interval": 1}
        chunks = await engine.async_generate(
            input_ids=PROMPTS[number], sampling_params=params, stream=True
        )
        return [chunk async for chunk in chunks]

    async def all_():
        return await asyncio.gather(*map(one, range(len(PROMPTS))))

    for number, chunks in enumerate(asyncio.run(all_())):
        counts = [len(chunk["output_ids"]) for chunk in chunks]
        assert counts == sorted(set(counts)) and len(counts) > 1
        assert chunks[-1]["output_ids"] == expected["seeded"][number]["output_ids"]


def test_aborts_reach_every_replica(engine):
    names = [f"abort-{number}" for number in range(4)]
    streams = [
        engine.generate(input_ids=text(1, 9), sampling_params=LONG, rid=name, stream=True)
        for name in names
    ]
    first = [next(stream) for stream in streams]
    assert sorted(ranks(first)) == [0, 0, 1, 1]
    assert not engine.flush_cache().success
    engine.abort_request("abort-2")
    assert list(streams[2])[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    streams[0].close()
    while engine.get_server_info()["num_running"] != 2:
        pass
    engine.abort_request(abort_all=True)
    for number in (1, 3):
        assert list(streams[number])[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.flush_cache().success


def test_a_profile_is_of_all(engine, tmp_path):
    engine.start_profile(str(tmp_path))
    with pytest.raises(ProfileError):
        engine.start_profile(str(tmp_path / "second"))
    engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    engine.stop_profile()
    assert list(tmp_path.rglob("*.xplane.pb"))
    with pytest.raises(ProfileError):
        engine.stop_profile()


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens"])
def test_other_methods(folder, expected, method):
    with jaxserve.Engine(folder, dp_size=2, load_balance_method=method, **OPTIONS) as engine:
        results = engine.generate(**CASES["seeded"])
        assert ids(results) == ids(expected["seeded"])
        if method == "round_robin":
            assert ranks(results) == [0, 1] * 4
        else:
            assert set(ranks(results)) == {0, 1}


def test_each_program_is_compiled_once(folder, caplog, monkeypatch):
    """By one replica, and loaded by the other three, on any mesh. Nothing is kept on disk."""
    real = Shared.folder
    monkeypatch.setattr(Shared, "folder", lambda self, path: real(self, None))
    caplog.set_level("INFO", logger="jaxserve")
    devices = [[jax.devices()[number]] for number in (6, 1, 4, 3)]
    mesh = jax.sharding.Mesh(np.array(devices), ("data", "tensor"))
    sizes = {"max_total_tokens": 1536, "max_running_requests": 2}
    options = {**OPTIONS, **sizes, "precompile": True, "wait_until_compiled": True}
    with jaxserve.Engine(folder, mesh=mesh, log_level="info", **options) as engine:
        results = [
            engine.generate(input_ids=PROMPTS[3], sampling_params=GREEDY, routed_dp_rank=rank)
            for rank in range(4)
        ]
        info = engine.get_server_info()
        places = collections.Counter()
        gc.collect()
        for loop in inside.replicas(engine):
            arrays = jax.tree.leaves(loop._runner._arrays)
            places[frozenset(d.id for array in arrays for d in array.devices())] += 1
    assert len({tuple(each) for each in ids(results)}) == 1
    assert places == {frozenset({number}): 1 for number in (6, 1, 4, 3)}
    assert info["late_compiles"] == 0
    assert (info["dp_size"], info["mesh"]) == (4, str(mesh))
    made = collections.Counter(
        record.getMessage().split()[0]
        for record in caplog.records
        if record.name.endswith("compile")
    )
    programs = info["programs"] // 4
    assert made == {"compiled": programs, "loaded": 3 * programs}


def test_a_queue_that_is_full(folder):
    options = {**OPTIONS, "max_running_requests": 1, "max_queued_requests": 2}
    with jaxserve.Engine(folder, dp_size=2, **options) as engine:
        streams = [
            engine.generate(input_ids=[text(n, 9)] * 3, sampling_params=LONG, stream=True)
            for n in range(2)
        ]
        for stream in streams:
            next(stream)
        with pytest.raises(InvalidRequestError, match="max_queued_requests=2"):
            engine.generate(input_ids=[text(4, 9)] * 4, sampling_params=GREEDY)
        before = engine.get_server_info()
        for stream in streams:
            stream.close()
        result = engine.generate(input_ids=text(4, 9), sampling_params=GREEDY)
    assert 1 <= before["num_running"] <= 2
    ended = before["finished_requests"]["length"]
    assert before["num_running"] + before["num_waiting"] + ended == 6
    assert len(result["output_ids"]) == GREEDY["max_new_tokens"]


def test_shutdown_ends_all(folder):
    engine = jaxserve.Engine(folder, dp_size=2, **OPTIONS)
    streams = [
        engine.generate(input_ids=text(n, 9), sampling_params=LONG, stream=True) for n in range(4)
    ]
    assert sorted(ranks([next(stream) for stream in streams])) == [0, 0, 1, 1]
    threads = [loop._thread for loop in inside.replicas(engine)]
    engine.shutdown()
    engine.shutdown()
    for stream in streams:
        with pytest.raises(EngineShutdownError):
            list(stream)
    for call in (engine.get_server_info, engine.flush_cache):
        with pytest.raises(EngineShutdownError):
            call()
    with pytest.raises(EngineShutdownError):
        engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
    assert not any(thread.is_alive() for thread in threads)
