"""Forked processes: what they may use of an engine, and that the parent does not notice them."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve
from jaxserve.errors import CopyError, JaxserveError
from tests.processes import environment

pytestmark = pytest.mark.usefixtures("kept_programs")

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 256, "max_running_requests": 4,
    "cuda_graph_bs": [1, 4], "chunked_prefill_size": 64, "max_total_tokens": 1024,
}  # fmt: skip
PROGRAM = """
import gc, multiprocessing, os, signal, sys, threading, time
import jaxserve
from tests import inside

MODEL, OPTIONS = {model!r}, {options!r}
SHORT = {{"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}}
LONG = {{**SHORT, "max_new_tokens": 200}}

def ask(engine):
    return engine.generate(input_ids=[5, 6], sampling_params=SHORT)["output_ids"]

def refused(function, *args):
    since = time.monotonic()
    try:
        function(*args)
    except jaxserve.ForkedProcessError as error:
        assert str(os.getpid()) in str(error) and "spawn" in str(error), error
        assert time.monotonic() - since < 5
        return
    raise AssertionError("not refused")

def in_child(function, *args, code=7):
    "Runs it in a forked child that ends as Python does; True if it ended in time and well."
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        function(*args)
        sys.exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code

def engine():
    return jaxserve.Engine(model_path=MODEL, **OPTIONS)
"""


def run(tiny_models, body):
    """`body` as a script of its own, after PROGRAM."""
    program = PROGRAM.format(model=tiny_models("llama"), options=OPTIONS) + body
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, timeout=240, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_child_is_refused_at_once_and_ends(tiny_models):
    """Calls, streams begun by the parent, control; whatever the parent's threads hold meanwhile.
    It may drop and shut down what is not its own."""
    run(tiny_models, """
with engine() as built:
    expected = ask(built)
    stream = built.generate(input_ids=[5, 6], sampling_params=LONG, stream=True)
    next(stream)
    def child():
        refused(ask, built)
        refused(built.chat, [{"role": "user", "content": "x"}])
        refused(lambda: built.generate(input_ids=[5], stream=True))
        refused(built.get_server_info)
        refused(built.flush_cache)
        refused(list, stream)
        built.abort_request(abort_all=True)
    builder, ids = built._builder, built._live_ids
    with inside.inbox(built)._lock, ids._lock, stream._call._mailbox._lock:
        pid = os.fork()  # with all locks held by a thread that the child has not
        if not pid:
            signal.alarm(60)
            failed = []
            def elsewhere():
                try:
                    child()
                except BaseException as error:
                    failed.append(error)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            os._exit(3 if failed else 0)
    assert os.waitpid(pid, 0)[1] == 0
    in_child(child)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(stream)[-1]["meta_info"]["completion_tokens"] == LONG["max_new_tokens"]
    assert ask(built) == expected

built = engine()
expected = ask(built)
stream = built.generate(input_ids=[5, 6], sampling_params=LONG, stream=True)
next(stream)
def drop():
    global built, stream
    stream = built = None
    gc.collect()
def leave():
    stream.close()
    with built:
        pass
    built.shutdown()
for function in (drop, leave, gc.collect):
    in_child(function)
assert list(stream)[-1]["meta_info"]["completion_tokens"] == LONG["max_new_tokens"]
assert ask(built) == expected
built.shutdown()
""")  # fmt: skip


def test_a_child_may_build_its_own_engine_unless_jax_was_in_use(tiny_models):
    run(tiny_models, """
def own():
    with engine() as built:
        print(ask(built))
import jax, jax.numpy as jnp  # imported is not used
in_child(own)
jnp.ones(3).block_until_ready()
in_child(refused, engine)
own()
in_child(refused, engine)
""")  # fmt: skip


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_engines_and_streams_cannot_be_copied(tiny_models, take):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        stream = engine.generate(input_ids=[5, 6], stream=True)
        later = asyncio.run(engine.async_generate(input_ids=[5, 6], stream=True))
        things = [engine, stream, later]
        if take is not copy.copy:  # which takes what is inside as it is
            things += [engine.generate, {"nested": [engine]}]
        for thing in things:
            with pytest.raises(CopyError, match="cannot be pickled or copied") as caught:
                take(thing)
            assert isinstance(caught.value, JaxserveError) and isinstance(caught.value, TypeError)
        stream.close()
        later._stop()
