"""Ctrl-C and the garbage collector come at any moment; no request may be left without a caller."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sys

import pytest

import jaxserve
from jaxserve.errors import InvalidRequestError
from jaxserve.inbox import Inbox, Task

pytestmark = pytest.mark.usefixtures("kept_programs")
OPTIONS = {
    "skip_tokenizer_init": True, "context_length": 1024, "max_running_requests": 4,
    "cuda_graph_bs": [1, 4],
    "chunked_prefill_size": 64, "max_total_tokens": 2048, "log_level": "critical",
}  # fmt: skip
ENDLESS = {"temperature": 0, "max_new_tokens": 1000, "ignore_eos": True}
SHORT = {**ENDLESS, "max_new_tokens": 40}
TRACED = tuple(
    f"jaxserve/{name}.py" for name in ("engine", "loop", "inbox", "signals", "api/call", "mailbox")
)


@pytest.fixture(scope="module")
def engine(tiny_models):
    with jaxserve.Engine(model_path=tiny_models("llama"), **OPTIONS) as engine:
        engine.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 4})
        yield engine


class Interrupt:
    """Raises KeyboardInterrupt in this thread at line number `line` (from 1) that runs in TRACED.
    Finalizers are spared, because Python drops what is raised in them, and `with` lines, which are
    also visited between a block's end and its lock's release, where no signal comes."""

    def __init__(self, line):
        self.left = line
        self.place = None

    def __call__(self, frame, event, _):
        code = frame.f_code
        if code.co_name == "__del__" or not code.co_filename.endswith(TRACED):
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and self.left and not line.startswith("with "):
            self.left -= 1
            if not self.left:
                self.place = f"{code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def wait(engine):
    engine.generate(input_ids=[5, 6], sampling_params=SHORT, rid="x")


def read(engine):
    stream = engine.generate(input_ids=[5, 6], sampling_params=ENDLESS, rid="x", stream=True)
    next(stream)
    next(stream)
    stream.close()


@pytest.mark.parametrize("use", [wait, read])
def test_ctrl_c_at_any_line_leaves_no_request_behind(engine, use):
    for line in range(1, 1000):
        with Interrupt(line) as interrupt, contextlib.suppress(KeyboardInterrupt):
            use(engine)
        info = engine.get_server_info()
        assert info["num_running"] + info["num_waiting"] == 0, interrupt.place
        assert not engine._live_ids._holders, interrupt.place
        if interrupt.left:  # the call has run undisturbed
            break
    assert 100 < line < 500
    assert info["available_tokens"] == info["max_total_num_tokens"]


def test_a_refused_id_stays_with_its_owner(engine):
    stream = engine.generate(input_ids=[5, 6], sampling_params=ENDLESS, rid="x", stream=True)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="Duplicate request ID"):
            engine.generate(input_ids=[5, 6], rid="x")
    stream.close()
    engine.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 1}, rid="x")


def test_the_collector_may_put_a_task_while_tasks_are_taken():
    inbox, ran = Inbox(), []

    def put(phase, _):
        if phase == "start":
            inbox.put(Task(lambda: ran.append("dropped"), lambda error: None))

    for number in range(3):
        inbox.put(Task(lambda n=number: ran.append(n), lambda error: None))
    threshold = gc.get_threshold()
    gc.callbacks.append(put)
    gc.set_threshold(1)
    try:
        tasks = inbox.take(block=False)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(put)
    assert tasks is not None
    for task in [*tasks, *(inbox.take(block=False) or [])]:
        task.run()
    assert [x for x in ran if x != "dropped"] == [0, 1, 2]
