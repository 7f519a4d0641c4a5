"""Pages of docs/ that are patches: applied to a copy of the source, and run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(?P<kind>python|diff)(?: (?P<path>\S+))?\n(?P<text>.*?)^```$", re.M | re.S)


def patched_copy(page: str, tree: Path) -> list[str]:
    """Copies the source into `tree`, writes the Python blocks of docs/`page` to their paths there
    and applies its diffs; the files touched."""
    for package in ("jaxserve", "converters", "pallas_kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    touched = []
    for block in BLOCK.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")):
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
        before = "".join(line[1:] or line for line in lines if line[0] in " -\n")
        after = "".join(line[1:] or line for line in lines if line[0] in " +\n")
        assert text.count(before) == 1, f"{path.name} has not this once:\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def run_there(module: str, tree: Path) -> None:
    """python -m `module` `tree`, with the source of `tree`; it must succeed."""
    path = os.pathsep.join((str(tree), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", module, str(tree)],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tree, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
