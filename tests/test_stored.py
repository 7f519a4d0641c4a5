"""Programs on disk: only what this user wrote is ever unpickled, and folders stay within limits."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest

from jaxserve.compat import without_compilation_cache
from jaxserve.folders import PrivateFolder, UnsafeFileError
from jaxserve.parallel.mesh import mesh_of
from jaxserve.step import stored
from jaxserve.step.stored import StoredPrograms

NAME = "increment"


@pytest.fixture(scope="module")
def program():
    with without_compilation_cache():
        return jax.jit(lambda x: x + 1).lower(jnp.zeros(4)).compile()


@pytest.fixture
def place(tmp_path, program, caplog):
    """A folder with one stored program."""
    caplog.set_level("WARNING", logger="jaxserve")  # engines set it for the process
    place = tmp_path / "programs"
    store(place).store(NAME, program, 5)
    return place


def store(place):
    return StoredPrograms(PrivateFolder(place), mesh_of(jax.devices("cpu")[0]), ())


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_a_stored_program_runs(place, caplog):
    program, memory = store(place).load(NAME, {})
    assert program(jnp.zeros(4)).tolist() == [1, 1, 1, 1] and memory == 5
    assert store(place).load("another", {}) is None
    assert not warned(caplog)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_a_bit_of_the_digest(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 128
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:20])


def empty(file):
    file.write_bytes(b"")


def let_others_write(file):
    file.chmod(0o602)


def let_the_group_write(file):
    file.chmod(0o620)


def open_the_folder(file):
    file.parent.chmod(0o777)


def open_the_folder_to_a_group(file):
    file.parent.chmod(0o770)


def give_away(file):
    os.chown(file, 12345, -1)


def give_the_folder_away(file):
    os.chown(file.parent, 12345, -1)


def link_the_file(file):
    elsewhere = file.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def link_the_folder(file):
    elsewhere = file.parent.parent / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)


def put_a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def put_a_folder(file):
    file.unlink()
    file.mkdir()


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.mark.parametrize(
    "tamper",
    [
        flip_a_bit, flip_a_bit_of_the_digest, cut, empty, let_others_write, let_the_group_write,
        open_the_folder, open_the_folder_to_a_group, link_the_file, link_the_folder, put_a_pipe,
        put_a_folder, pytest.param(give_away, marks=ROOT_ONLY),
        pytest.param(give_the_folder_away, marks=ROOT_ONLY),
    ],
)  # fmt: skip
def test_what_others_could_have_written_is_not_unpickled(place, monkeypatch, caplog, tamper):
    """And one warning, however many programs there are, says why and names the option."""
    tamper(place / NAME)

    def loads(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(stored.pickle, "loads", loads)
    programs = store(place)
    assert programs.load(NAME, {}) is None and programs.load(NAME, {}) is None
    (text,) = warned(caplog)
    assert "compilation_cache_dir" in text and "compiled anew" in text
    assert "unpickled" not in text and (NAME in text or str(place) in text)


def test_programs_are_their_owners_alone_whatever_the_umask(tmp_path, program):
    place = tmp_path / "deep" / "programs"
    before = os.umask(0)
    try:
        store(place).store(NAME, program, 0)
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / NAME).stat().st_mode & 0o777 == 0o600


def test_a_program_that_cannot_be_stored_leaves_nothing_behind(place, program, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError("injected: no space left")

    monkeypatch.setattr("jaxserve.folders.os.replace", full)
    programs = store(place)
    programs.store("other", program, 0)
    programs.store("third", program, 0)
    assert os.listdir(place) == [NAME]
    assert len(warned(caplog)) == 1 and "no space left" in warned(caplog)[0]


def test_a_folder_that_others_could_write_to_gets_nothing(place, program, caplog):
    place.chmod(0o777)
    store(place).store("other", program, 0)
    assert os.listdir(place) == [NAME] and "0777" in warned(caplog)[0]


# -- folders --------------------------------------------------------------------------------------


def fill(folder, count, size):
    """`count` files of `size` bytes, the first used longest ago."""
    for number in range(count):
        folder.write(f"{number}-cache", b"x" * size)
        os.utime(folder.path / f"{number}-cache", (1000 + number, 1000 + number))


def test_a_folder_is_kept_within_a_size(tmp_path):
    """What was unused for longest goes first; files of other names stay."""
    folder = PrivateFolder(tmp_path / "cache")
    fill(folder, 6, 100)
    folder.write("mine", b"x" * 1000)
    os.utime(folder.path / "mine", (0, 0))
    os.utime(folder.path / "0-cache", (2000, 500))  # read lately
    folder.prune(suffix="-cache", most_bytes=350)
    assert sorted(os.listdir(folder.path)) == ["0-cache", "4-cache", "5-cache", "mine"]
    folder.prune(suffix="-cache", most_bytes=350)
    assert len(os.listdir(folder.path)) == 4


def test_what_was_unused_for_long_is_deleted(tmp_path):
    folder = PrivateFolder(tmp_path / "cache")
    fill(folder, 2, 10)
    folder.touch("1-cache")
    (folder.path / "folder").mkdir()
    folder.prune(unused_seconds=3600)
    assert sorted(os.listdir(folder.path)) == ["1-cache", "folder"]


def test_folders_that_cannot_be_used_are_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        PrivateFolder(tmp_path / "file").create()
    with pytest.raises(OSError):
        PrivateFolder(tmp_path / "file" / "below").create()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeFileError, match=r"open has mode 0777"):
        PrivateFolder(tmp_path / "open").create()
