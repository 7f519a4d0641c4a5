"""Engines in programs that configure JAX otherwise: same tokens, and its settings stay."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxserve
from jaxserve import compat
from jaxserve.compat import Settings
from tests import inside
from tests.marks import long
from tests.processes import environment

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 256, "max_running_requests": 4,
    "cuda_graph_bs": [1, 4],
    "chunked_prefill_size": 64, "max_total_tokens": 1024, "log_level": "critical",
}  # fmt: skip
SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
    "jax_transfer_guard": "disallow",
    "jax_no_tracing": True,
}
OTHERS = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_check_tracer_leaks": True,
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_explain_cache_misses": True,
}


@contextlib.contextmanager
def configured(values):
    """The program's own settings, for all its threads."""
    # what guards transfers of all kinds is three settings, which it overwrites
    kinds = ("device_to_device", "device_to_host", "host_to_device")
    names = [*(f"jax_transfer_guard_{kind}" for kind in kinds), *values]
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name in reversed(names):
            jax.config.update(name, before[name])


def tokens(engine):
    """Of greedy and sampled rows, with a bias and a penalty: every kind of program."""
    common = {"max_new_tokens": 6, "ignore_eos": True}
    sampled = {**common, "temperature": 0.8, "top_p": 0.9, "sampling_seed": 3}
    params = [
        {**common, "temperature": 0},
        {**sampled, "logit_bias": {"5": 2.0}, "presence_penalty": 0.5},
    ]
    results = engine.generate(
        input_ids=[[5, 6], [7, 8, 9]], sampling_params=params, return_logprob=True,
        logprob_start_len=0, top_logprobs_num=2,
    )  # fmt: skip
    return [result["output_ids"] for result in results]


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def expected(model):
    with jaxserve.Engine(model_path=model, **OPTIONS) as engine:
        return tokens(engine)


@pytest.mark.parametrize(
    "values",
    [SETTINGS | OTHERS, *(long({n: v}) for n, v in SETTINGS.items()), long(OTHERS)],
    ids=str,
)
def test_settings_made_before_the_engine(model, expected, values):
    with configured(values), jaxserve.Engine(model_path=model, **OPTIONS) as engine:
        assert tokens(engine) == expected
        assert engine.get_server_info()["late_compiles"] == 0
        for name, value in values.items():
            assert getattr(jax.config, name) == value


def test_settings_made_while_the_engine_runs(model, expected):
    """Before its first program is compiled; the program computes as it says meanwhile."""
    with jaxserve.Engine(model_path=model, **OPTIONS) as engine:
        with configured({"jax_enable_x64": True}):
            assert jnp.arange(3).dtype == jnp.int64
            with configured({**SETTINGS, **OTHERS}):
                assert tokens(engine) == expected
            assert jnp.arange(3).dtype == jnp.int64
        with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            assert tokens(engine) == expected
        assert engine.get_server_info()["late_compiles"] == 0


def test_settings_of_the_environment(model, expected):
    program = (
        "import sys, jaxserve; sys.path.insert(0, '.'); from tests import test_jax_settings as t\n"
        f"with jaxserve.Engine(model_path={model!r}, **t.OPTIONS) as e: print(t.tokens(e))"
    )
    hostile = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**hostile),
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(expected), done.stderr


def test_platforms_that_do_not_exist_are_named(model):
    program = (
        f"import jaxserve\ntry: jaxserve.Engine(model_path={model!r})\n"
        "except jaxserve.InvalidRequestError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=120,
        capture_output=True, text=True, env=environment(JAX_PLATFORMS="abacus"),
    )  # fmt: skip
    assert "jax_platforms" in done.stdout and "abacus" in done.stdout, done.stderr


def test_the_users_precision_and_device_are_those_when_the_engine_is_built(model):
    def seen():
        return jax.config.jax_default_matmul_precision, jax.config.jax_default_device

    device = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"), jax.default_device(device):
        engine = jaxserve.Engine(model_path=model, **OPTIONS)
    with engine, configured({"jax_default_matmul_precision": "bfloat16"}):
        assert inside.call(engine, seen) == ("highest", device)


def test_the_programs_settings_make_no_other_stored_programs():
    with Settings.here().applied():
        plain = compat.settings()
    with configured({**SETTINGS, **OTHERS}), Settings.here().applied():
        assert compat.settings() == plain
    with jax.default_matmul_precision("highest"), Settings.here().applied():
        assert compat.settings() != plain


LIMITS = {
    "jax_persistent_cache_min_compile_time_secs": 7.0,
    "jax_persistent_cache_min_entry_size_bytes": 1234,
}


def test_what_the_program_says_of_its_cache_stays(monkeypatch, tmp_path):
    with configured({**LIMITS, "jax_compilation_cache_dir": str(tmp_path)}):
        assert compat.cache_configured()
        compat.enable_compilation_cache(None)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert {name: getattr(jax.config, name) for name in LIMITS} == LIMITS
    name, *_ = LIMITS
    with configured({name: 1.0, "jax_compilation_cache_dir": None}):
        monkeypatch.setenv(name.upper(), "1.0")  # JAX's default, on purpose
        assert not compat.cache_configured()
        compat.enable_compilation_cache(str(tmp_path))
        assert getattr(jax.config, name) == 1.0
        monkeypatch.delenv(name.upper())
        compat.enable_compilation_cache(str(tmp_path))
        assert getattr(jax.config, name) == 0.0
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_a_limit_of_the_program_s_own_is_seen(monkeypatch):
    assert not compat.cache_limited()
    with configured({"jax_compilation_cache_max_size": 10**6}):
        assert compat.cache_limited()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    assert compat.cache_limited()
