"""What is said while programs compile, and where they are kept."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxserve.api import startup
from jaxserve.step import notice
from jaxserve.step.notice import Notice

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(notice, "PATIENCE", 0.2)
    monkeypatch.setattr(notice, "FROM_CACHE", 0.1)
    monkeypatch.setattr(notice, "TICK", 0.01)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    logging.getLogger("jaxserve").setLevel("ERROR")  # Engine's default


class Terminal(io.StringIO):
    def isatty(self):
        return True


def compile_(said, names, seconds):
    with said.shown(names) as ready:
        for _ in names:
            with said.compiling():
                time.sleep(seconds)
            ready()


def test_long_compilation_is_said_once(capsys):
    said = Notice()
    for _ in range(3):
        compile_(said, ["extend_64"], 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "compiling extend_64" in lines[0]


def test_many_short_ones_are_said_too(capsys):
    said = Notice()
    for name in ("decode_1", "decode_2", "decode_4", "decode_8"):
        compile_(said, [name], 0.15)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_number_of_programs_is_said_where_it_is_known(capsys):
    compile_(Notice(), ["decode_1", "decode_2", "extend_64"], 0.2)
    assert "compiling 3 programs" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_each_time(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    said = Notice()
    compile_(said, ["extend_64"], 0.5)
    assert "Compiling extend_64 [00:00]" in terminal.getvalue()
    compile_(said, ["decode_1", "decode_2"], 0.5)
    assert "Compiling 2 programs" in terminal.getvalue() and "1/2" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()  # bars go when they are done


def test_nothing_is_said_of_programs_from_the_cache(capsys):
    said = Notice()
    for _ in range(20):
        compile_(said, ["decode_1"], 0.02)
    compile_(said, [f"decode_{n}" for n in range(20)], 0.02)
    compile_(said, [], 0)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("how", ["level", "variable"])
def test_it_can_be_turned_off(monkeypatch, capsys, how):
    if how == "level":
        logging.getLogger("jaxserve").setLevel("CRITICAL")
    else:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    compile_(Notice(), ["extend_64"], 0.5)
    assert not capsys.readouterr().err


def test_a_failed_compilation_ends_the_notice(capsys):
    said = Notice()
    with pytest.raises(RuntimeError, match="injected"), said.shown(["decode_1"]), said.compiling():
        raise RuntimeError("injected")
    assert not said._running


# -- the folder -----------------------------------------------------------------------------------


def test_the_usual_folder_is_made_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        folder = startup._cache_folder(str(tmp_path / "deep" / "programs"))
    finally:
        os.umask(before)
    assert folder is not None and os.stat(folder).st_mode & 0o777 == 0o700


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "programs"


def an_open_folder(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    return tmp_path / "open"


def a_link(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    return tmp_path / "link"


@pytest.mark.parametrize("make", [a_file, an_open_folder, a_link])
def test_a_folder_that_cannot_be_used_is_one_warning(tmp_path, make):
    with pytest.warns(UserWarning, match="compilation_cache_dir chooses another") as caught:
        assert startup._cache_folder(str(make(tmp_path))) is None
    assert len(caught) == 1


@pytest.mark.long
def test_an_engine_works_without_a_home(tiny_models):
    """One warning, which names the option; and without an option nothing is said but that."""
    program = (
        "import jaxserve\n"
        f"with jaxserve.Engine(model_path={tiny_models('llama')!r}, skip_tokenizer_init=True,"
        "    context_length=64, max_running_requests=1, max_total_tokens=64,"
        "    chunked_prefill_size=16, log_level='critical') as engine:\n"
        "    print(len(engine.generate(input_ids=[5], sampling_params={'max_new_tokens': 2,"
        "        'ignore_eos': True})['output_ids']))"
    )
    environment = {**os.environ, "HOME": "/dev/null"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "2", done.stderr
    assert done.stderr.count("UserWarning") == 1 and "compilation_cache_dir" in done.stderr


def test_nobody_without_a_home_folder_is_refused(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(UserWarning, match=r"no home folder.*compilation_cache_dir"):
        assert startup._cache_folder(None) is None
