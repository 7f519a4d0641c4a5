"""`python -m jaxserve MODEL [PROMPT]`, as its user runs it: through pipes and a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxserve
import jaxserve.terminal
from tests.processes import environment

pytestmark = [pytest.mark.usefixtures("kept_programs"), pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "jaxserve"]
GREEDY = {"temperature": 0, "max_new_tokens": 12}
FLAGS = ["--temperature", "0", "--max-new-tokens", "12"]
SYSTEM = [{"role": "system", "content": "be kind"}]


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("llama")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The same model without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    for file in Path(model).iterdir():
        if "template" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes().replace(b"chat_template", b"x"))
    return str(folder)


@pytest.fixture(scope="module")
def engine(model):
    with jaxserve.Engine(model_path=model) as engine:
        yield engine


def run(*arguments, typed=""):
    return subprocess.run(
        [*COMMAND, *arguments], input=typed, capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=environment(TQDM_DISABLE="1"),  # no word of compiling, where that takes long
    )  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def conversation(engine, texts, start=()):
    """What a chat prints for these lines: each answer sees the ones before it."""
    messages, answers = list(start), []
    for text in texts:
        messages.append(user(text))
        answers.append(engine.chat(messages, GREEDY)["text"])
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.long
def test_one_answer_with_a_system_message_and_options_of_the_engine(engine, model):
    done = run(model, "--system", "be kind", "What is the answer?", *FLAGS, "--stream-output")
    [answer] = conversation(engine, ["What is the answer?"], SYSTEM)
    assert answer and (done.returncode, done.stdout, done.stderr) == (0, answer + "\n", "")


def test_turns_remember_the_ones_before_until_cleared(engine, model):
    """A line that cannot be answered costs that line alone."""
    lines = ["hello world", "who are you", "x" * 500, "", "/clear", "hello world", "/exit", "no"]
    done = run(model, *FLAGS, "--context-length", "256", typed="\n".join(lines))
    first, second = conversation(engine, ["hello world", "who are you"])
    shown = done.stdout.replace(jaxserve.terminal.HELP, "(help)")
    assert shown == f"{first}\n{second}\n(help)\n{first}\n"
    assert done.returncode == 0
    assert done.stderr.startswith("InvalidRequestError: ") and done.stderr.count("\n") == 1
    assert "context length" in done.stderr


@pytest.mark.long
def test_without_a_chat_template_lines_are_continued(engine, plain):
    text = engine.generate("Once upon a time", GREEDY)["text"]
    done = run(plain, *FLAGS, typed="Once upon a time\n")
    assert done.stdout == f"{jaxserve.terminal.NO_TEMPLATE}\n{text}\n"
    refused = run(plain, "hi", "--system", "be kind")
    assert refused.returncode == 1 and "--system needs a chat template" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nonexistent", "hi"], "ModelLoadError: model_path='/nonexistent'"),
        (["/nonexistent", "--temperature", "-1"], "InvalidRequestError: temperature"),
        (["/nonexistent", "--page-size", "0"], "InvalidRequestError: page_size"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_help_and_bad_usage():
    done = run("--help")
    assert done.returncode == 0
    assert "MODEL" in done.stdout and "--temperature" in done.stdout and "--dtype" in done.stdout
    assert run().returncode == run("m", "hi", "--no-such-option").returncode == 2


TERMINAL_OF_ITS_OWN = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, sys.orig_argv[:1] + sys.argv[1:])"
)


class Typist:
    """Somebody at a terminal, in which the command runs."""

    def __init__(self, *arguments):
        self.terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL_OF_ITS_OWN, *COMMAND[1:], *arguments],
            stdin=inside, stdout=inside, stderr=inside, cwd=ROOT, start_new_session=True,
            env=environment(),
        )  # fmt: skip
        os.close(inside)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)

    def wait_for(self, text, seconds=200):
        """Reads on until `text` has appeared; returns what came before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self.terminal], [], [], left)[0]
            assert ready, f"no {text!r} in {self.seen[-2000:]!r}"
            self.seen += os.read(self.terminal, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys):
        os.write(self.terminal, keys.encode())

    def status(self):
        """The exit status, after whatever is still printed."""
        with contextlib.suppress(OSError):  # what Linux says when the other side is closed
            while os.read(self.terminal, 4096):
                pass
        return self.process.wait(timeout=60)


ENDLESS = [
    "--max-new-tokens", "65000", "--max-total-tokens", "65536", "--temperature", "0",
    "--preferred-sampling-params", '{"ignore_eos": true}',
]  # fmt: skip
"""65,000 tokens take minutes: only Ctrl-C brings what follows in time."""


@pytest.fixture(scope="module")
def long(tiny_models):
    return tiny_models("llama", max_position_embeddings=65536)


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(engine, long):
    begins = engine.chat([user("hello world")], GREEDY)["text"][:3]
    with Typist(long, *ENDLESS) as person:
        person.wait_for(jaxserve.terminal.HELP)
        person.wait_for("> ")
        for _ in range(2):
            person.type("hello world\n")
            person.wait_for("hello world\r\n")
            person.wait_for(begins)
            person.type("\x03")
            person.wait_for("\n> ")
            person.type("/clear\n")
            person.wait_for("\n> ")
        person.type("half a line")
        person.wait_for("half a line")
        time.sleep(1)  # a signal just before Python waits for a key shows at the next key only
        person.type("\x03")
        person.wait_for("\n> ")
        person.type("\x04")
        assert person.status() == 0


@pytest.mark.long
def test_ctrl_c_during_the_only_answer_ends_with_its_status(engine, long):
    begins = engine.chat([user("hello world")], GREEDY)["text"][:3]
    with Typist(long, "hello world", *ENDLESS) as person:
        person.wait_for(begins)
        person.type("\x03")
        assert person.status() == 128 + signal.SIGINT
