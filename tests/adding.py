"""Pages of the documentation that add something, done as they say in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(?P<kind>python|diff)(?: (?P<path>\S+))?\n(?P<text>.*?)^```$", re.M | re.S)


def copy_source(tree: Path) -> None:
    """The packages, and what ruff wants to know of them."""
    for package in ("jaxserve", "converters", "pallas_kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)


def apply(page: str, tree: Path) -> tuple[list[str], list[str]]:
    """Write the Python blocks of docs/`page` to their paths and apply its diffs. The files of its
    own, and the files that were there and are touched, which must be as many as the page says, if
    it does."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    own, touched = [], []
    for block in BLOCK.finditer(text):
        if block["kind"] == "python":
            assert not (tree / block["path"]).exists(), block["path"]
            (tree / block["path"]).write_text(block["text"], encoding="utf-8")
            own.append(block["path"])
        else:
            touched.append(patch(block["text"], tree))
    said = re.search(r"^Files touched beside the feature's own: (\d+)\.$", text, re.M)
    assert said is None or int(said[1]) == len(set(touched)), (page, touched)
    return own, touched


def patch(diff: str, tree: Path) -> str:
    """Apply a unified diff of one file, whose context may have moved but must be there once."""
    [name] = re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M)
    text = (tree / name).read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] or line for line in lines if line[0] in " -\n")
        after = "".join(line[1:] or line for line in lines if line[0] in " +\n")
        assert text.count(before) == 1, f"{name} has not this once:\n{before}"
        text = text.replace(before, after)
    (tree / name).write_text(text, encoding="utf-8")
    return name


def check_style(tree: Path, files: list[str]) -> None:
    """What pages add is as ruff wants it."""
    for command in (["check"], ["format", "--check"]):
        _run([sys.executable, "-m", "ruff", *command, *files], tree)


def run(module: str, tree: Path, *arguments: str) -> None:
    """`python -m module TREE ...`, whose packages are those of the tree."""
    _run([sys.executable, "-m", module, str(tree), *arguments], tree)


def _run(command: list[str], tree: Path) -> None:
    path = os.pathsep.join((str(tree), str(ROOT)))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
