"""A model cut over devices gives what it gives on one, whatever the family and the request."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import converters
import jaxserve
from jaxserve.errors import InvalidRequestError
from jaxserve.parallel.mesh import bytes_on_each
from tests import inside
from tests.marks import long
from tests.mesh.cases import CASES, OPTIONS, PROMPTS, SEEDED, logprobs
from tests.prompts import ids, text

pytestmark = pytest.mark.usefixtures("kept_programs")
# eight heads of two KV heads: on more than two devices some have the same ones
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "phi3": {},
    "glm": {},
    "glm4": {"tie_word_embeddings": True},
    "cohere2": {"attention_bias": True, "tie_word_embeddings": True},
}
MESHES = [(1, 2), (1, 4), (1, 8), (2, 2)]
"""(dp_size, tp_size)."""
NAMES = list(CASES)
MANY = {
    "input_ids": [text(seed, 150) for seed in range(12)],
    "sampling_params": {**SEEDED, "max_new_tokens": 60},
}


def features(mesh, family):
    """Two of CASES, so that each meets each mesh."""
    pair = (MESHES.index(mesh) + list(FAMILIES).index(family) // 2) % (len(NAMES) // 2)
    return NAMES[2 * pair : 2 * pair + 2]


@pytest.fixture(scope="module")
def folder(tiny_models):
    return lambda family: tiny_models(family, **HEADS | FAMILIES.get(family, {}))


@pytest.fixture(scope="module")
def expected(folder):
    """What one device makes of some cases, by family."""
    found = {}

    def of(family, names):
        missing = [name for name in names if (family, name) not in found]
        if missing:
            with jaxserve.Engine(folder(family), **OPTIONS) as engine:
                for name in missing:
                    found[family, name] = engine.generate(**CASES[name])
        return [found[family, name] for name in names]

    return of


def assert_same(results, expected):
    assert ids(results) == ids(expected)
    for mine, other in zip(results, expected, strict=True):
        if "output_token_logprobs" in other["meta_info"]:
            np.testing.assert_allclose(logprobs(mine), logprobs(other), atol=1e-4)


def pairs():
    """Two meshes for each family: on one of them devices share KV heads."""
    for number, family in enumerate(FAMILIES):
        for mesh in MESHES[:2] if number % 2 == 0 else MESHES[2:]:
            yield mesh, family


def test_all_pairs_are_covered():
    assert {family for _, family in pairs()} == FAMILIES.keys()
    met = {(mesh, name) for mesh, family in pairs() for name in features(mesh, family)}
    assert met == {(mesh, name) for mesh in MESHES for name in NAMES}


def marked():
    """A run without the long ones has four devices that share two KV heads, and both kinds of
    parallelism at once."""
    for mesh, family in pairs():
        often = (mesh, family) in (((1, 4), "qwen2"), ((2, 2), "qwen3"))
        marks = () if often else pytest.mark.long
        yield pytest.param(mesh, family, marks=marks, id=f"dp{mesh[0]}tp{mesh[1]}-{family}")


@pytest.mark.parametrize(("mesh", "family"), list(marked()))
def test_the_tokens_of_one_device(folder, expected, mesh, family):
    dp, tp = mesh
    with jaxserve.Engine(folder(family), dp_size=dp, tp_size=tp, **OPTIONS) as engine:
        results = [engine.generate(**CASES[name]) for name in features(mesh, family)]
        info = engine.get_server_info()
        assert info["late_compiles"] == 0 and (info["dp_size"], info["tp_size"]) == mesh
    for mine, other in zip(results, expected(family, features(mesh, family)), strict=True):
        assert_same(mine, other)


@pytest.mark.parametrize(("family", "tp"), [
    long("gemma2", 2), long("granite", 2), long("olmo3", 2), long("smollm3", 2),
    ("olmo2", 4), long("gemma3", 4),
])  # fmt: skip
def test_other_families_give_the_tokens_of_one_device(folder, expected, family, tp):
    """OLMo's norms of q and k are over all devices' heads, of which several have the same k."""
    names = ["greedy", "logprobs"]
    with jaxserve.Engine(folder(family), tp_size=tp, **OPTIONS) as engine:
        results = [engine.generate(**CASES[name]) for name in names]
        assert engine.get_server_info()["late_compiles"] == 0
    for mine, other in zip(results, expected(family, names), strict=True):
        assert_same(mine, other)


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
    options = {**OPTIONS, "tp_size": 2, "enable_deterministic_inference": True}
    with jaxserve.Engine(folder("qwen3"), **options) as engine:
        case = {"sampling_params": SEEDED, "return_logprob": True}
        batch = engine.generate(input_ids=PROMPTS, **case)
        assert engine.flush_cache().success
        alone = [engine.generate(input_ids=prompt, **case) for prompt in PROMPTS]
    assert ids(batch) == ids(alone)
    assert [logprobs(x) for x in batch] == [logprobs(x) for x in alone]


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
