"""Helpers of `sglang.utils`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxserve


def test_utils_needs_no_import_of_its_own():
    program = "import sys, jaxserve; jaxserve.utils.trim_overlap; assert 'jax' not in sys.modules"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=60)


@pytest.mark.parametrize(
    ("existing", "chunk", "rest"),
    [
        ("Hello wor", "world", "ld"),
        ("Hello", "Hello world", " world"),
        ("abc", "xyz", "xyz"),
        ("aaa", "aa", ""),
        ("ab", "bab", "ab"),
        ("", "new", "new"),
        ("old", "", ""),
    ],
)
def test_trim_overlap(existing, chunk, rest):
    assert jaxserve.utils.trim_overlap(existing, chunk) == rest


def test_print_highlight(capsys):
    jaxserve.utils.print_highlight("<b>bold</b>")
    jaxserve.utils.print_highlight({"a": 1})
    assert capsys.readouterr().out == "<b>bold</b>\n{'a': 1}\n"


@pytest.mark.parametrize("deltas", [False, True])
def test_streams_merge_to_the_whole_text(tiny_models, deltas):
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    model = tiny_models("llama")
    with jaxserve.Engine(model_path=model, stream_output=deltas) as engine:
        whole = engine.generate("she sells", params)["text"]
        assert jaxserve.utils.stream_and_merge(engine, "she sells", params) == whole

        async def collect():
            merged = jaxserve.utils.async_stream_and_merge(engine, "she sells", params)
            return [piece async for piece in merged]

        pieces = asyncio.run(collect())
        assert "".join(pieces) == whole and len(pieces) > 1


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_terminate_process_ends_it_and_what_it_started():
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        grandchild = int(process.stdout.readline())
    jaxserve.utils.terminate_process(process)
    assert process.returncode == -9
    if sys.platform == "linux":
        assert gone(grandchild)
    jaxserve.utils.terminate_process(process)  # has ended already


def gone(pid, seconds=30.0):
    """Whether the process ends; one that nobody has waited for yet is a zombie."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    os.kill(pid, 9)
    return False
