"""A model cut over devices gives what it gives on one, whatever the options; test_families.py goes
through the families and requests."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import converters
import jaxserve
from jaxserve.errors import InvalidRequestError
from jaxserve.parallel.mesh import bytes_on_each
from tests import inside
from tests.mesh.cases import CASES, OPTIONS, PROMPTS, SEEDED, assert_same, logprobs
from tests.prompts import ids, text

pytestmark = pytest.mark.usefixtures("kept_programs")
MANY = {
    "input_ids": [text(seed, 150) for seed in range(12)],
    "sampling_params": {**SEEDED, "max_new_tokens": 60},
}


@pytest.fixture(scope="module")
def pair(folder):
    """Engines on two devices and on one with `options`, and all that they are asked."""

    def run(family, calls, **options):
        found = []
        for tp in (2, 1):
            with jaxserve.Engine(folder(family), tp_size=tp, **{**OPTIONS, **options}) as engine:
                found.append([ids(engine.generate(**call)) for call in calls])
                info = engine.get_server_info()
                assert info["late_compiles"] == 0
        return found, info

    return run


@pytest.mark.long
def test_retracted_requests_and_host_memory(pair):
    options = {"max_total_tokens": 640, "max_running_requests": 8}
    options |= {"enable_hierarchical_cache": True, "hicache_ratio": 4.0}
    (cut, whole), info = pair("llama", [MANY, MANY], **options)
    assert cut == whole
    assert info["retractions"] > 0 and info["pages_moved_out"] > 0 and info["pages_moved_in"] > 0


def test_deterministic_inference(folder):
    """Bitwise the same alone and in a batch."""
    options = {**OPTIONS, "tp_size": 2, "cuda_graph_bs": None}
    options["enable_deterministic_inference"] = True
    with jaxserve.Engine(folder("qwen3"), **options) as engine:
        case = {"sampling_params": SEEDED, "return_logprob": True}
        batch = engine.generate(input_ids=PROMPTS, **case)
        assert engine.flush_cache().success
        alone = [engine.generate(input_ids=prompt, **case) for prompt in PROMPTS]
    assert ids(batch) == ids(alone)
    assert [logprobs(x) for x in batch] == [logprobs(x) for x in alone]


@pytest.mark.long
def test_quantized_weights(pair):
    calls = [CASES["greedy"], CASES["prefixes"]]
    (cut, whole), _ = pair("qwen2", calls, quantization="w8a16_int8")
    assert cut == whole


@pytest.mark.long
def test_float8_weights_and_pages(folder):
    """Sums that round otherwise move some keys and values to the next float8, so logprobs are close
    rather than tokens equal."""
    options = {**OPTIONS, "quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}
    found = []
    for tp in (2, 1):
        with jaxserve.Engine(folder("qwen2"), tp_size=tp, **options) as engine:
            results = engine.generate(**CASES["logprobs"])
            rows = [result["meta_info"]["input_token_logprobs"][1:] for result in results]
            found.append([value for row in rows for value, _, _ in row])
    difference = np.abs(np.subtract(*found))
    assert 0 < np.mean(difference) < 0.02 and np.max(difference) < 0.3


def test_everything_is_compiled_beforehand(folder, expected):
    options = {**OPTIONS, "tp_size": 2, "precompile": True, "chunked_prefill_size": 64}
    with jaxserve.Engine(folder("llama"), **options) as engine:
        for name in ("seeded", "logprobs"):
            assert_same(engine.generate(**CASES[name]), *expected("llama", [name]))
        assert engine.get_server_info()["late_compiles"] == 0


@pytest.mark.long
def test_a_mesh_of_ones_own(folder, expected):
    devices = np.array(jax.devices()[3:7]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    with jaxserve.Engine(folder("qwen3"), mesh=mesh, **OPTIONS) as engine:
        assert_same(engine.generate(**CASES["greedy"]), *expected("qwen3", ["greedy"]))
        assert engine.get_server_info()["late_compiles"] == 0


def test_each_device_has_its_part(folder):
    with jaxserve.Engine(folder("qwen2"), **OPTIONS) as engine:
        whole = inside.runner(engine)
        weights = bytes_on_each(whole._arrays["params"])
        pages = whole.cache.k.nbytes / whole.num_pages
    with jaxserve.Engine(folder("qwen2"), tp_size=2, **OPTIONS) as engine:
        runner = inside.runner(engine)
        params = runner._arrays["params"]
        on_devices = {device: 0 for device in runner._mesh.devices.flat}
        for shard in (shard for array in params for shard in array.addressable_shards):
            on_devices[shard.device] += shard.data.nbytes
        # norms alone are on both
        assert set(on_devices.values()) == {bytes_on_each(params)}
        assert weights / 2 < bytes_on_each(params) < weights * 0.51
        assert bytes_on_each([runner.cache.k]) / runner.num_pages == pages / 2
        usage = engine.get_server_info()["internal_states"][0]["memory_usage"]
        assert usage["weight"] == bytes_on_each(params) / 2**30


@pytest.mark.long
def test_orbax_folders(folder, expected, tmp_path):
    loaded = converters.load(folder("llama"), dtype="float32")
    converters.save(loaded, tmp_path / "orbax", "orbax")
    with jaxserve.Engine(str(tmp_path / "orbax"), tp_size=4, **OPTIONS) as engine:
        assert_same(engine.generate(**CASES["greedy"]), *expected("llama", ["greedy"]))


@pytest.mark.parametrize(
    ("tp", "told"),
    [
        (3, "tp_size=3 does not divide the model's num_attention_heads=8"),
        (5, "num_key_value_heads=2"),
        (9, "dp_size=1 x tp_size=9"),
    ],
)
def test_what_does_not_divide(folder, tp, told):
    with pytest.raises(InvalidRequestError, match=told):
        jaxserve.Engine(folder("llama"), tp_size=tp, **OPTIONS)
