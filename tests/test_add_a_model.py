"""docs/add_a_model.md, done as it says: in a copy of the source, and against Hugging Face."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "add_a_model.md"
BLOCK = re.compile(r"^```(?P<kind>python|diff)(?: (?P<path>\S+))?\n(?P<text>.*?)^```$", re.M | re.S)

pytest.importorskip("torch")


def apply(page: str, tree: Path) -> list[str]:
    """Writes the page's Python blocks to their paths and applies its diffs; the files touched."""
    touched = []
    for block in BLOCK.finditer(page):
        if block["kind"] == "python":
            (tree / block["path"]).write_text(block["text"], encoding="utf-8")
            touched.append(block["path"])
        else:
            patch(block["text"], tree)
            touched += re.findall(r"^\+\+\+ b/(\S+)$", block["text"], re.M)
    return touched


def patch(diff: str, tree: Path) -> None:
    """Applies a unified diff of one file, whose context may have moved but must be there once."""
    path = tree / re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M)[0]
    text = path.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"{path.name} has not this once:\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_the_page_adds_a_family(tmp_path):
    for package in ("jaxserve", "converters", "pallas_kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    touched = apply(PAGE.read_text(encoding="utf-8"), tmp_path)
    assert touched == [
        "jaxserve/models/gemma2.py", "jaxserve/models/registry.py", "converters/tables.py",
    ]  # fmt: skip
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.added_model", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
