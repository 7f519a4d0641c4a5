"""Compiled programs: late compiles are seen, the cache is updated in place, memory is sized."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import time

import jax
import jax.numpy as jnp
import pytest

import jaxserve
from jaxserve.cache.pool import ALLOCATOR_FRACTION, count_pages, page_bytes
from jaxserve.config import EngineConfig
from jaxserve.errors import InvalidRequestError
from jaxserve.models.registry import config_from_hf
from jaxserve.parallel.mesh import mesh_of
from jaxserve.server_args import ServerArgs
from jaxserve.step.compile import Programs
from jaxserve.step.xla_options import xla_options
from tests import inside
from tests.machines import GPU, MACHINES
from tests.marks import long
from tests.whole_programs import keep_programs

OPTIONS = {
    "skip_tokenizer_init": True,
    "context_length": 256,
    "max_running_requests": 8,
    "chunked_prefill_size": 128,
    "max_total_tokens": 1024,
    "log_level": "warning",
}
COMPILED = {
    **OPTIONS, "cuda_graph_bs": [2, 8], "precompile": True, "wait_until_compiled": True,
}  # fmt: skip
SHORT = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module", params=[long(1), 4])
def precompiled(request, tiny_models):
    options = {**COMPILED, "num_continuous_decode_steps": request.param}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def large_cache(tiny_models):
    """A cache next to which a program's other temporaries are small."""
    options = {**OPTIONS, "context_length": 8192, "max_total_tokens": 65536}
    options["num_continuous_decode_steps"] = 4
    model = tiny_models("llama", max_position_embeddings=8192)
    with jaxserve.Engine(model_path=model, **options) as engine:
        yield engine


def test_a_random_workload_compiles_nothing_after_precompilation(precompiled):
    random_ = random.Random(0)
    before = precompiled.get_server_info()
    for round_ in range(6):
        count = random_.randint(1, 14)
        prompts = [[random_.randrange(4, 500)] * random_.randint(1, 150) for _ in range(count)]
        params = [
            {
                "max_new_tokens": random_.randint(1, 30),
                "temperature": random_.choice([0, 0.7]),
                "top_p": random_.choice([1.0, 0.8]),
                "presence_penalty": random_.choice([0, 1.0]),
                "logit_bias": random_.choice([None, {"5": 1.0}]),
                "n": 1 + round_ % 2,
            }
            for _ in prompts
        ]
        precompiled.generate(
            input_ids=prompts,
            sampling_params=params,
            return_logprob=bool(round_ % 3),
            logprob_start_len=random_.choice([-1, 0]),
            top_logprobs_num=round_,
        )
    after = precompiled.get_server_info()
    assert after["late_compiles"] == before["late_compiles"] == 0
    assert after["programs"] == before["programs"]


def test_a_compilation_that_slips_through_is_counted(tiny_models, caplog):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        engine.generate(input_ids=[5, 6], sampling_params=SHORT)
        assert engine.get_server_info()["late_compiles"] == 0
        inside.call(engine, lambda: jnp.sin(jnp.ones(1237)).block_until_ready())
        assert engine.get_server_info()["late_compiles"] >= 1
        assert "unplanned compile" in caplog.text


def test_a_program_first_used_after_precompilation_is_counted(tiny_models, caplog):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        inside.runner(engine).programs.expect_no_more()
        engine.generate(input_ids=[5, 6], sampling_params=SHORT)
        assert engine.get_server_info()["late_compiles"] >= 2
        assert "late compile of extend[64]" in caplog.text


def test_programs_are_traced_in_turn_and_compiled_side_by_side():
    """XLA has the first program before the second is traced; meanwhile nobody looks for cycles."""
    active, most, order = [], [], []

    def builder(key):
        def traced(x):
            active.append(key)
            most.append(len(active))
            assert not gc.isenabled()
            time.sleep(0.02)
            active.remove(key)
            order.append(key)
            return x * key[1]

        return traced, (jax.ShapeDtypeStruct((8,), jnp.float32),), ()

    programs = Programs(builder, mesh_of(jax.devices("cpu")[0]), lambda rows, timed=True: {})
    keys = [("scale", n) for n in range(8)]
    assert gc.isenabled()
    programs.build(keys, threads=8)
    assert gc.isenabled()
    assert sorted(order) == keys and max(most) == 1
    assert programs.program(("scale", 3))(jnp.ones(8)).tolist() == [3.0] * 8
    programs.close()


def test_extend_programs_are_compiled_before_the_others(monkeypatch, tiny_models):
    """Mosaic kernels wait for the end of all other work in LLVM."""
    done = []
    compile_one = Programs._compile

    def recorded(self, key, **how):
        program = compile_one(self, key, **how)
        done.append(key[0])
        return program

    monkeypatch.setattr(Programs, "_compile", recorded)
    with jaxserve.Engine(model_path=tiny_models("llama"), **COMPILED) as engine:
        extends = len(inside.runner(engine).config.buckets.extend)
    assert done[:extends] == ["extend"] * extends and "extend" not in done[extends:]


@pytest.mark.parametrize(
    "key",
    [long(("decode", 1)), long(("decode", 2)), ("decode", 8), long(("decode_many", 1)),
     ("decode_many", 8), ("extend", 64), ("copy_pages", 16)],
)  # fmt: skip
def test_the_cache_is_updated_in_place(large_cache, key):
    """No copy of the pages in the compiled program, and temporaries far below them."""
    runner = inside.runner(large_cache)
    runner.programs.memory(key)  # compiles it
    compiled = runner.programs._compiled[key]
    pages = runner.cache.k
    shapes = {pages.shape, (pages.shape[0] * pages.shape[1], *pages.shape[2:])}
    names = ["f32[" + ",".join(map(str, shape)) + "]" for shape in shapes]
    copies = [
        line
        for line in compiled.as_text().splitlines()
        if " copy(" in line and any(name in line.split(" copy(")[0] for name in names)
    ]
    assert not copies
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 4


def test_results_count_among_a_programs_memory(large_cache):
    """An extend step returns the last hidden state of each of its tokens: 0.8 GiB of 100,000
    tokens of the 8B."""
    runner = inside.runner(large_cache)
    key = ("extend", runner.config.buckets.max_tokens)
    memory = runner.programs.memory(key)
    temporaries = runner.programs._compiled[key].memory_analysis().temp_size_in_bytes
    hidden = key[1] * runner.model_config.hidden_size * runner.dtype.itemsize
    assert temporaries + hidden <= memory < temporaries + 2 * hidden + runner.cache.k.nbytes


# -- sizing ---------------------------------------------------------------------------------------

MODEL = config_from_hf(
    {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "max_position_embeddings": 8192, "hidden_act": "silu",
        "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1,
    }
)  # fmt: skip
GIB = 1 << 30
assert GPU.memory is not None
FRAGMENTED = GPU.memory.fragmented
USABLE = 80 * GIB * ALLOCATOR_FRACTION * (1 - FRAGMENTED)
WEIGHT_BYTES = 15 * GIB


@dataclasses.dataclass
class Device:
    """A device that reports `limit` bytes."""

    limit: int
    in_use: int = 0

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use}


def resolve(platform="gpu", **options):
    return EngineConfig.resolve(ServerArgs("x", **options), MODEL, MACHINES[platform], WEIGHT_BYTES)


def test_gpu_pool_takes_its_fraction_less_the_weights():
    config = resolve(mem_fraction_static=0.8)
    dtype = jnp.dtype(jnp.bfloat16)
    each = page_bytes(MODEL, 64, dtype)
    assert each == 32 * 2 * 64 * 8 * 128 * 2
    device = Device(int(80 * GIB * 0.95))
    pages = count_pages(config, MODEL, dtype, device, 15 * GIB, GIB)
    assert pages * each == pytest.approx(80 * GIB * 0.8 - 15 * GIB, abs=each * 2)
    tight = count_pages(config, MODEL, dtype, device, 15 * GIB, 20 * GIB)
    assert tight * each == pytest.approx(USABLE - 35 * GIB, abs=each * 2)


def test_a_fraction_above_the_usual_share_is_of_the_whole_device():
    dtype = jnp.dtype(jnp.bfloat16)
    device = Device(int(80 * GIB * 0.98))  # what JAX then takes
    pages = count_pages(resolve(mem_fraction_static=0.98), MODEL, dtype, device, 15 * GIB, 0)
    each = page_bytes(MODEL, 64, dtype)
    usable = 80 * GIB * 0.98 * (1 - FRAGMENTED)
    assert pages * each == pytest.approx(usable - 15 * GIB, abs=each * 2)


def test_a_second_engine_leaves_the_first_ones_memory_alone():
    dtype = jnp.dtype(jnp.bfloat16)
    weights = 15 * GIB
    device = Device(int(80 * GIB * 0.95), in_use=weights + 50 * GIB)
    pages = count_pages(resolve(), MODEL, dtype, device, weights, GIB)
    left = USABLE - 50 * GIB - GIB - weights
    each = page_bytes(MODEL, 64, dtype)
    assert pages * each == pytest.approx(left, abs=each * 2)


def test_pool_never_exceeds_what_requests_can_use_or_the_user_allows():
    dtype = jnp.dtype(jnp.bfloat16)
    device = Device(1000 * GIB)
    config = resolve(max_running_requests=4)
    assert count_pages(config, MODEL, dtype, device, 0, 0) == 4 * 8192 // 64
    config = resolve(max_total_tokens=20480)
    assert count_pages(config, MODEL, dtype, device, 0, 0) == 20480 // 64


def test_a_pool_that_cannot_hold_a_page_is_an_error():
    with pytest.raises(InvalidRequestError, match="mem_fraction_static"):
        count_pages(resolve(), MODEL, jnp.dtype(jnp.bfloat16), Device(16 * GIB), 16 * GIB, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"page_size": 12}, "page_size"), ({"attention_backend": "triton"}, "attention_backend")],
)
def test_options_that_do_not_fit_the_machine_are_errors(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        resolve("cpu", **options)


def test_decode_buckets_follow_cuda_graph_options():
    assert resolve(cuda_graph_max_bs=48).buckets.decode[-1] == 48
    assert resolve(cuda_graph_bs=[1, 7, 30]).buckets.decode == (1, 7, 30)
    assert resolve(max_running_requests=10).buckets.decode == (1, 2, 4, 8, 10)


def test_several_decode_steps_are_for_small_models_on_a_gpu_unless_asked_for():
    def steps(platform, weight_bytes, **options):
        args = ServerArgs("x", **options)
        return EngineConfig.resolve(
            args, MODEL, MACHINES[platform], weight_bytes
        ).program.steps_per_dispatch

    assert steps("gpu", GIB) == 4
    assert steps("gpu", 15 * GIB) == 1
    assert steps("cpu", GIB) == 1
    for platform in ("cpu", "gpu"):
        for asked in (1, 8):
            assert steps(platform, GIB, num_continuous_decode_steps=asked) == asked


# -- programs on disk -----------------------------------------------------------------------------


def generated(folder, caplog, **options):
    """(tokens, programs compiled, programs loaded) of a small engine's life."""
    caplog.clear()
    caplog.set_level("INFO", logger="jaxserve")
    options = {**OPTIONS, "log_level": "info", **options}
    with jaxserve.Engine(model_path=folder, **options) as engine:
        tokens = engine.generate(input_ids=[5, 6, 9], sampling_params=SHORT)["output_ids"]
        assert engine.get_server_info()["late_compiles"] == 0
    lines = [r.message for r in caplog.records if r.name == "jaxserve.step.compile"]
    return tokens, *(sum(line.startswith(how) for line in lines) for how in ("compiled", "loaded"))


def test_a_second_start_loads_its_programs(tiny_models, monkeypatch, tmp_path, caplog):
    keep_programs(monkeypatch, tmp_path)
    folder = tiny_models("llama", num_hidden_layers=1)
    first, compiled, loaded = generated(folder, caplog)
    assert (compiled, loaded) == (2, 0)
    assert len(list(tmp_path.iterdir())) == 2
    assert generated(folder, caplog) == (first, 0, 2)
    # what the scheduler alone looks at makes no other programs; other sizes and other code do
    same = {"schedule_policy": "lpm", "max_prefill_tokens": 64, "disable_radix_cache": True}
    assert generated(folder, caplog, **same) == (first, 0, 2)
    assert generated(folder, caplog, max_total_tokens=512)[1:] == (2, 0)
    monkeypatch.setattr("jaxserve.step.stored._sources", lambda: "changed")
    assert generated(folder, caplog) == (first, 2, 0)


@pytest.mark.long
def test_a_damaged_or_missing_store_only_costs_time(tiny_models, monkeypatch, tmp_path, caplog):
    keep_programs(monkeypatch, tmp_path)
    folder = tiny_models("llama", num_hidden_layers=1)
    first, *_ = generated(folder, caplog)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert generated(folder, caplog) == (first, 2, 0)
    assert generated(folder, caplog) == (first, 0, 2)
    (tmp_path / "a file").write_text("")
    keep_programs(monkeypatch, tmp_path / "a file")
    assert generated(folder, caplog) == (first, 2, 0)
    assert len(warned(caplog)) == 1 and "compilation_cache_dir" in warned(caplog)[0]


def warned(caplog):
    """The warnings about stored programs since `generated` began."""
    records = [r for r in caplog.records if r.name == "jaxserve.step.stored"]
    return [r.getMessage() for r in records if r.levelname == "WARNING"]


def test_programs_that_nobody_uses_are_deleted(tiny_models, monkeypatch, tmp_path, caplog):
    keep_programs(monkeypatch, tmp_path)
    folder = tiny_models("llama", num_hidden_layers=1)
    generated(folder, caplog)
    old, new = tmp_path.iterdir()
    os.utime(old, (0, 0))
    generated(folder, caplog)
    assert new.exists()
    assert old.stat().st_mtime > 0  # compiled and stored again


def test_options_of_gpu_programs():
    """Few rows: XLA may choose its own products. Many: cuBLAS, of quantized kernels only very many.
    The deterministic mode: cuBLAS, and nothing is chosen by the clock."""
    fixed_cpu = resolve("cpu", enable_deterministic_inference=True).program
    assert xla_options(fixed_cpu, 512) == {}
    own, chosen = "xla_gpu_enable_triton_gemm", "xla_gpu_autotune_level"
    few, many = (xla_options(resolve().program, rows) for rows in (8, 256))
    assert own not in few and many[own] is False and chosen not in many
    assert own not in xla_options(resolve().program, 256, quantized=True)
    assert xla_options(resolve().program, 8192, quantized=True)[own] is False
    fixed = xla_options(resolve(enable_deterministic_inference=True).program, 8)
    assert (fixed[own], fixed[chosen]) == (False, "0")
    for options in (few, many, fixed):  # names that this XLA does not know are an error
        assert jax.jit(lambda x: x + 1).lower(1).compile(options)(1) == 2
