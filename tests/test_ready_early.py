"""An engine answers when few of its programs are there; the others are compiled behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import jax
import pytest

import jaxserve
from jaxserve.step.compile import Programs
from jaxserve.step.compiler import Compiler
from jaxserve.step.workers import Workers
from tests import inside
from tests.marks import long
from tests.prompts import ids
from tests.test_programs import OPTIONS, SHORT
from tests.whole_programs import keep_programs

pytestmark = pytest.mark.usefixtures("kept_programs")
DECODE, EXTEND = [1, 8], [64, 128]
EARLY = {**OPTIONS, "cuda_graph_bs": DECODE, "precompile": True}
FIRST = 2 + 1 + 2
"""extend and prompt_logprobs of 128 tokens, decode of 8 rows, and the two for pages and lists."""
PROMPTS = [[(7 * row + i) % 500 for i in range(5 + 15 * row)] for row in range(12)]
PARAMS = [
    {"temperature": row % 2, "max_new_tokens": 3 + row, "ignore_eos": True, "sampling_seed": row}
    for row in range(12)
]


def everything(engine):
    """Tokens and prompt logprobs of a few calls."""
    one = engine.generate(input_ids=PROMPTS[3], sampling_params=SHORT)
    rows = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    scored = engine.generate(
        input_ids=PROMPTS[:5], sampling_params=SHORT, return_logprob=True, logprob_start_len=0
    )
    return (
        [row["output_ids"] for row in [one, *rows]],
        [[x[0] for x in row["meta_info"]["input_token_logprobs"][1:]] for row in scored],
    )


@pytest.fixture
def gate(monkeypatch):
    """An event without which nothing is compiled behind; the test sets it."""
    opened = threading.Event()
    compile_one = Programs._compile

    def gated(self, key, *, late=False, at_rest=True):
        if not at_rest:
            opened.wait(60)
        return compile_one(self, key, late=late, at_rest=at_rest)

    monkeypatch.setattr(Programs, "_compile", gated)
    yield opened
    opened.set()


def until_complete(engine):
    deadline = time.monotonic() + 120
    while engine.get_server_info()["programs_compiling"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return engine.get_server_info()


def test_requests_use_the_programs_that_are_there(tiny_models, gate):
    path = tiny_models("llama")
    with jaxserve.Engine(model_path=path, **{**EARLY, "wait_until_compiled": True}) as engine:
        info = engine.get_server_info()
        expected = everything(engine)
    programs = info["programs"]
    assert info["programs_compiling"] == info["late_compiles"] == 0
    assert (info["decode_buckets"], info["extend_buckets"]) == (DECODE, EXTEND)
    with jaxserve.Engine(model_path=path, **EARLY) as engine:
        info = engine.get_server_info()
        assert (info["decode_buckets"], info["extend_buckets"]) == ([8], [128])
        assert info["programs"] == FIRST
        assert info["programs_compiling"] == programs - FIRST
        tokens, logprobs = everything(engine)
        assert tokens == expected[0]
        for row, same in zip(logprobs, expected[1], strict=True):
            assert row == pytest.approx(same, abs=1e-5)
        info = engine.get_server_info()
        assert info["programs"] == FIRST and info["late_compiles"] == 0
        gate.set()
        info = until_complete(engine)
        assert (info["decode_buckets"], info["extend_buckets"]) == (DECODE, EXTEND)
        assert info["programs"] == programs and info["programs_untimed"] == 0
        assert everything(engine)[0] == expected[0]
        assert engine.get_server_info()["late_compiles"] == 0


def test_several_steps_at_once_wait_for_their_programs(tiny_models, gate):
    options = {**EARLY, "num_continuous_decode_steps": 4}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        runner = inside.runner(engine)
        assert runner.ready.several == set()
        params = {**SHORT, "max_new_tokens": 9}
        before = engine.get_server_info()["decode_steps"]
        alone = engine.generate(input_ids=[5, 6], sampling_params=params)["output_ids"]
        info = engine.get_server_info()
        assert info["decode_steps"] - before == 8 and info["late_compiles"] == 0
        gate.set()
        until_complete(engine)
        assert runner.ready.several == set(DECODE)
        assert engine.generate(input_ids=[5, 6], sampling_params=params)["output_ids"] == alone
        assert engine.get_server_info()["late_compiles"] == 0


@pytest.mark.parametrize(("kind", "products"), [("layer_products", 4), ("head_product", 1)])
def test_programs_that_choose_kernels_are_there_when_wanted(tiny_models, kind, products):
    """On a GPU alone; here they are lowered. Layers share a function for each of their products."""
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        function, arguments, donated = inside.runner(engine)._catalogue.lowerable((kind, 4))
        text = jax.jit(function, donate_argnums=donated).lower(*arguments).as_text()
    assert text.count("stablehlo.dot_general") == products


def test_deterministic_inference_waits_for_its_programs(tiny_models, gate):
    options = {**EARLY, "enable_deterministic_inference": True, "cuda_graph_bs": None}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        info = engine.get_server_info()
        assert info["programs_compiling"] == 0
        assert len(info["decode_buckets"]) == len(info["extend_buckets"]) == 1


@pytest.mark.long
def test_programs_are_stored_as_they_come(tiny_models, gate, monkeypatch, tmp_path):
    """As on a GPU, where XLA may time kernels only at rest. What was compiled without is another
    file: an engine that waits for its programs compiles those anew, and has the best."""

    def options(config, rows, *, timed=True, quantized=False):
        return {} if timed else {"xla_backend_optimization_level": "1"}

    keep_programs(monkeypatch, tmp_path)
    monkeypatch.setattr("jaxserve.step.runner.xla_options", options)
    path = tiny_models("llama", num_hidden_layers=1)

    def started(wait):
        options = {**EARLY, "max_running_requests": 1, "wait_until_compiled": wait}
        return jaxserve.Engine(model_path=path, **options)

    def files():
        return len(list(tmp_path.iterdir()))

    with started(wait=False) as engine:
        info = engine.get_server_info()
        assert files() == info["programs"] == 5 and info["programs_compiling"] == 2
    gate.set()
    with started(wait=False) as engine:  # goes on where the one before ended
        info = until_complete(engine)
        assert files() == info["programs"] == 7 and info["programs_untimed"] == 2
    for wait, untimed in ((False, 2), (True, 0), (False, 0)):
        with started(wait) as engine:
            info = engine.get_server_info()
            # an engine that does not wait loads two of them behind
            assert info["programs"] + info["programs_compiling"] == 7
            assert info["programs_compiling"] in ((0,) if wait else (0, 1, 2))
            info = until_complete(engine)
            assert info["programs"] == 7 and info["programs_untimed"] == untimed
    assert files() == 9


@pytest.fixture
def untimed(monkeypatch, tmp_path):
    """As on a GPU: what is compiled behind has other options, and engines keep their programs."""

    def options(config, rows, *, timed=True, quantized=False):
        return {} if timed else {"xla_backend_optimization_level": "1"}

    keep_programs(monkeypatch, tmp_path)
    monkeypatch.setattr("jaxserve.step.runner.xla_options", options)
    monkeypatch.setattr("jaxserve.step.retiming.REST_SECONDS", 0.05)
    monkeypatch.setattr("jaxserve.step.retiming.LOOK_SECONDS", 0.02)


def until_timed(engine, most):
    """Once at most `most` programs are untimed."""
    deadline = time.monotonic() + 120
    while engine.get_server_info()["programs_untimed"] > most:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def choosing(monkeypatch):
    """As on a GPU: XLA chooses kernels for few rows by timing them, which a CPU's does not."""
    for module in ("programs", "runner"):
        monkeypatch.setattr(f"jaxserve.step.{module}.chooses_by_timing", lambda config: True)


def test_what_must_be_timed_and_can_wait_comes_at_rest(
    tiny_models, untimed, choosing, monkeypatch, caplog, tmp_path
):
    resting, time_one = threading.Event(), Programs.time_one

    def gated(self):
        resting.wait(60)
        return time_one(self)

    monkeypatch.setattr(Programs, "time_one", gated)
    caplog.set_level("INFO", "jaxserve")
    model = tiny_models("llama", num_hidden_layers=1)
    call = {"input_ids": PROMPTS[:2], "sampling_params": SHORT}
    options = {**EARLY, "model_path": model, "cuda_graph_bs": [1, 2, 8], "log_level": "info"}

    def chosen():
        logged = [record.getMessage().split(" chosen")[0] for record in caplog.records]
        caplog.clear()
        return {text.removeprefix("kernels of ") for text in logged if "kernels of" in text}

    with jaxserve.Engine(**options) as engine:
        info = until_complete(engine)
        assert info["decode_buckets"] == [1, 8] and info["programs_untimed"] >= 2
        expected = engine.generate(**call)
        resting.set()
        until_timed(engine, most=0)
        info = engine.get_server_info()
        assert info["decode_buckets"] == [1, 2, 8] and info["late_compiles"] == 0
        assert ids(engine.generate(**call)) == ids(expected)
    names = chosen()
    assert {"layer_products[1]", "head_product[8]"} < names
    assert not any(name.endswith("[2]") for name in names)
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
    with jaxserve.Engine(**options) as engine:  # without programs, but with what was chosen
        assert until_complete(engine)["programs"] > FIRST
    assert chosen() == set()


@pytest.mark.long
def test_what_was_compiled_behind_is_timed_at_rest(tiny_models, gate, untimed):
    options = {**EARLY, "max_running_requests": 2}
    path = tiny_models("llama", num_hidden_layers=1)
    with jaxserve.Engine(model_path=path, **options) as engine:
        expected = everything(engine)
        gate.set()
        before = inside.runner(engine).programs._compiled
        until_complete(engine)
        behind = dict(before)
        until_timed(engine, most=0)
        assert {key for key in behind if behind[key] is not before[key]} == {
            ("decode", 1), ("extend", 64), ("prompt_logprobs", 64),
        }  # fmt: skip
        assert everything(engine)[0] == expected[0]
        assert engine.get_server_info()["late_compiles"] == 0
    with jaxserve.Engine(model_path=path, **options) as engine:
        assert until_complete(engine)["programs_untimed"] == 0


@pytest.mark.long
def test_what_is_timed_beside_a_request_is_thrown_away(tiny_models, gate, untimed, monkeypatch):
    programs: list[Programs] = []
    time_one = Programs.time_one
    compile = Compiler.compile

    def disturbed(self, lowered, options, **more):
        program = compile(self, lowered, options, **more)
        if programs:  # a step is queued while XLA times
            engine.generate(input_ids=[5, 6], sampling_params=SHORT)
        return program

    def first_disturbed(self):
        programs.append(self)
        try:
            return time_one(self)
        finally:
            programs.remove(self)
            monkeypatch.setattr(Compiler, "compile", compile)

    monkeypatch.setattr(Compiler, "compile", disturbed)
    monkeypatch.setattr(Programs, "time_one", first_disturbed)
    options = {**EARLY, "max_running_requests": 2}
    with jaxserve.Engine(model_path=tiny_models("llama"), **options) as engine:
        gate.set()
        until_complete(engine)
        until_timed(engine, most=1)
        time.sleep(0.3)
        info = engine.get_server_info()
        assert info["programs_untimed"] == 1 and info["late_compiles"] == 0


def test_a_program_that_cannot_be_compiled_is_done_without(tiny_models, monkeypatch, caplog):
    compile_one = Programs._compile

    def broken(self, key, *, late=False, at_rest=True):
        if key in (("decode", 1), ("extend", 64)):
            raise RuntimeError("no such kernel")
        return compile_one(self, key, late=late, at_rest=at_rest)

    monkeypatch.setattr(Programs, "_compile", broken)
    with jaxserve.Engine(model_path=tiny_models("llama"), **EARLY) as engine:
        info = until_complete(engine)
        assert (info["decode_buckets"], info["extend_buckets"]) == ([8], [128])
        engine.generate(input_ids=[[5, 6], [7]], sampling_params=SHORT)
        assert engine.get_server_info()["late_compiles"] == 0
    assert "decode[1] could not be compiled" in caplog.text


@pytest.mark.parametrize("end", ["shutdown", "collected"])
def test_nobody_waits_for_what_is_being_compiled_behind(tiny_models, gate, end):
    engine = jaxserve.Engine(model_path=tiny_models("llama"), **EARLY)
    engine.generate(input_ids=[5, 6], sampling_params=SHORT)
    programs = inside.runner(engine).programs
    assert programs.compiling
    started = time.monotonic()
    if end == "shutdown":
        engine.shutdown()
    del engine
    assert time.monotonic() - started < 2
    gate.set()
    behind = programs._behind
    assert behind is not None
    behind.wait(60)
    assert not behind.busy and len(programs) == 0


def test_workers_stop_when_whoever_waits_is_interrupted():
    begun, done = threading.Event(), []

    def do(job):
        begun.set()
        time.sleep(0.05)
        done.append(job)

    workers = Workers(do, range(100), threads=2)
    begun.wait()
    waits = workers._threads[0]

    def interrupted(timeout=None):
        raise KeyboardInterrupt

    waits.join = interrupted
    with pytest.raises(KeyboardInterrupt):
        workers.wait()
    del waits.join
    workers.wait(10)
    assert not workers.busy and len(done) <= 2


def test_errors_of_jobs_are_kept_and_the_others_done():
    done = []

    def do(job):
        if job == 3:
            raise ValueError(job)
        done.append(job)

    workers = Workers(do, range(6), threads=1)
    workers.wait()
    assert done == [0, 1, 2, 4, 5]
    assert [(job, str(error)) for job, error in workers.errors] == [(3, "3")]


LEAVING = """
import sys, threading, time
import jax, jax.numpy as jnp
from jaxserve.step.workers import Workers

def long(x):
    for i in range({operations}):
        x = jnp.sort(jnp.sin(x) @ x + i, axis=0)
    return x

class AtTheEnd:
    def __del__(self, sleep=time.sleep):
        sleep({finalizing})

kept = AtTheEnd()
lowered = jax.jit(long).lower(jax.ShapeDtypeStruct((65, 65), jnp.float32))
compiling = threading.Event()

def do(job):
    compiling.set()
    lowered.compile()
    print("compiled", flush=True)

workers = Workers(do, range(5), threads=2)
compiling.wait()
time.sleep(0.3)
print("leaving", time.time(), flush=True)
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), long("", 0), long("1 / 0", 1)])
def test_a_program_ends_with_its_status_while_xla_compiles(end, status):
    result, seconds = leave(end, operations=1500, finalizing=0)
    assert result.returncode == status, result.stderr
    assert "compiled" not in result.stdout
    assert seconds < 6  # on a busy machine; a second of it is waiting for the compilation


def test_a_compilation_may_end_while_the_interpreter_goes():
    result, _ = leave("sys.exit(3)", operations=60, finalizing=4)
    assert result.returncode == 3, result.stderr


TRACING = """
import atexit, sys, threading, time

@atexit.register
def say():
    names = [thread.name for thread in threading.enumerate()]
    print("left", names.count("jaxserve-compile"), file=sys.stderr)

import jax, jax.numpy as jnp
from jaxserve.step.workers import Workers

begun = threading.Event()

def some(x):
    for i in range(30):
        x = jnp.where(jnp.sin(x) > i, x, jnp.cumsum(x, axis=0))
    return x

def do(job):
    while True:
        jax.make_jaxpr(lambda x: some(x))(jnp.ones((5, 5)))
        begun.set()

workers = Workers(do, range(9), threads=2)
begun.wait()
time.sleep(0.5)
print("leaving", time.time(), flush=True)
sys.exit(3)
"""


def test_no_thread_is_in_python_code_when_the_interpreter_goes():
    """On Python 3.12 it would crash there."""
    result, seconds = run_until_left(TRACING)
    assert result.returncode == 3 and result.stderr.split() == ["left", "0"]
    assert seconds < 4


def leave(end, operations, finalizing):
    """A program that ends while XLA compiles `operations` sorts: (result, seconds it took to)."""
    return run_until_left(LEAVING.format(end=end, operations=operations, finalizing=finalizing))


def run_until_left(script):
    """(result of a program that prints when it leaves, seconds it took to from then on)."""
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    # a compilation that takes as long as with all passes
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, **environment}
    )
    return result, time.time() - float(result.stdout.split()[1])
