"""The KV pool: no larger than a checkpoint proves it to be worth, the same at every start, and what
it makes of a context that it cannot hold."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxserve
from jaxserve.cache import pool
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import config_from_hf
from jaxserve.server_args import ServerArgs
from tests import gguf_files
from tests.checkpoints import make_config
from tests.machines import CPU

ROOT = Path(__file__).parent.parent
OPTIONS = {"skip_tokenizer_init": True, "log_level": "warning"}
HUGE = 10**8
MIB = 1 << 20
FLOAT = jnp.dtype("float32")


def check_memory(info: dict) -> None:
    """GiB of a model of half a megabyte."""
    usage = info["memory_usage"]
    assert usage["kvcache"] <= 0.25 and usage["state"] < 0.05


@pytest.fixture(scope="module")
def claiming(tiny_models):
    """An engine of a model that claims a context of 10**8 tokens."""
    with jaxserve.Engine(
        model_path=tiny_models("llama", max_position_embeddings=HUGE), **OPTIONS
    ) as engine:
        yield engine


def test_a_context_that_nothing_confirms_costs_little(claiming):
    info = claiming.get_server_info()
    check_memory(info)
    assert info["context_length"] == info["max_total_num_tokens"] < HUGE
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    assert len(claiming.generate(input_ids=[5, 6, 7], sampling_params=params)["output_ids"]) == 4


def test_a_prompt_beyond_the_pool_is_refused_with_its_size(claiming):
    longest = claiming.get_server_info()["context_length"]
    with pytest.raises(jaxserve.InvalidRequestError, match=rf"holds {longest} tokens"):
        claiming.generate(input_ids=[5] * (longest + 1))


@pytest.mark.parametrize("origin", ["mistral", "override", "gguf"])
def test_the_same_wherever_it_is_claimed(origin, tiny_models, tmp_path, caplog):
    """One line says to what the context is cut."""
    options = dict(OPTIONS)
    if origin == "gguf":
        path = str(tmp_path / "tiny.gguf")
        gguf_files.write_model(Path(path), metadata={"{arch}.context_length": HUGE})
    elif origin == "override":
        path = tiny_models("llama")
        options["json_model_override_args"] = f'{{"max_position_embeddings": {HUGE}}}'
    else:  # a sequence may be longer than the pool: tables are the limit
        path = tiny_models("mistral", max_position_embeddings=HUGE)
    with caplog.at_level(logging.WARNING), jaxserve.Engine(model_path=path, **options) as engine:
        info = engine.get_server_info()
    check_memory(info)
    assert info["max_req_input_len"] + 1 == info["context_length"] < HUGE
    message = f"the context of {HUGE} tokens is cut to {info['context_length']}"
    assert sum(message in record.getMessage() for record in caplog.records) == 1


def test_a_context_that_fits_is_not_mentioned(tiny_models, caplog):
    options = OPTIONS | {"max_total_tokens": 256}
    with (
        caplog.at_level(logging.WARNING),
        jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine,
    ):
        info = engine.get_server_info()
    assert info["context_length"] == 256 and "is cut" not in caplog.text
    assert engine.server_args.context_length is None


def resolve(model: ModelConfig, **options) -> EngineConfig:
    return EngineConfig.resolve(ServerArgs("x", **options), model, CPU, 0)


def count(monkeypatch, free: int, weights: int = 0, state: int = 0, **options) -> int:
    monkeypatch.setattr(pool, "available_host_memory", lambda: free)
    model = config_from_hf(make_config(max_position_embeddings=HUGE))
    return pool.count_pages(resolve(model, **options), model, FLOAT, None, weights, state)


def test_tables_have_a_limit_of_their_own():
    model = config_from_hf(make_config("mistral", max_position_embeddings=HUGE))
    for rows in (1, 32, 4096):
        config = resolve(model, max_running_requests=rows)
        most = CPU.defaults.table_bytes
        assert 0.9 * most < 4 * (rows + 1) * config.program.table_width <= most
    model = config_from_hf(make_config("mistral", max_position_embeddings=131_072))
    assert resolve(model).program.table_width == 131_072 // 16


def test_free_memory_that_varies_gives_the_same_pages(monkeypatch):
    """Three starts of one program, and any by a few per cent: mostly one size, never too large."""
    assert {pool.coarse(pages) for pages in (1456, 1438, 1419)} == {1280}
    each = 2 * 2 * 16 * 2 * 16 * 4
    sizes = set()
    for free in range(300 * MIB, 600 * MIB, MIB):
        pages = count(monkeypatch, free)
        assert 0.75 * free / 4 < pages * each <= free / 4
        sizes.add(pages)
    assert len(sizes) <= 6  # of an octave


@pytest.mark.parametrize("pages", [1, 2, 3, 7, 8, 9, 1000, 12345, 10**9])
def test_the_grid(pages):
    assert pages * 4 / 5 < pool.coarse(pages) <= pages
    assert pool.coarse(pool.coarse(pages)) == pool.coarse(pages)


def test_weights_and_the_user_say_what_a_pool_may_take(monkeypatch):
    plenty = 1 << 40
    each = 2 * 2 * 16 * 2 * 16 * 4
    assert count(monkeypatch, plenty) * each == 256 * MIB
    assert count(monkeypatch, plenty, weights=200 * MIB) * each == pool.coarse(800) * MIB
    assert count(monkeypatch, plenty, weights=10 << 30) * each == 2 << 30
    assert count(monkeypatch, plenty, max_total_tokens=10**7) == 10**7 // 16
    # the state is memory as pages are
    assert count(monkeypatch, 800 * MIB) == 2 * count(monkeypatch, 800 * MIB, state=100 * MIB)


SECOND_START = """
import sys
import jax
import jaxserve
from jaxserve.cache import pool
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/")[-1]))
for free in (440 << 20, 430 << 20):
    events.clear()
    pool.available_host_memory = lambda: free
    with jaxserve.Engine(
        model_path=sys.argv[1], skip_tokenizer_init=True, compilation_cache_dir=sys.argv[2],
        max_running_requests=4, chunked_prefill_size=64,
    ) as engine:
        engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 3})
        pages = engine.get_server_info()["num_pages"]
    print(pages, events.count("cache_hits"), events.count("cache_misses"))
"""


@pytest.mark.long
def test_a_second_start_with_other_free_memory_compiles_nothing(tiny_models, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", SECOND_START,
         tiny_models("llama", max_position_embeddings=10**6), str(tmp_path / "programs")],
        text=True, capture_output=True, cwd=ROOT, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (pages, _, missed), (again, hits, missed_again) = (
        map(int, line.split()) for line in done.stdout.splitlines()[-2:]
    )
    assert pages == again and missed > 0
    assert hits > 0 and missed_again == 0
