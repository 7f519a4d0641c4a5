"""What the source distribution and the wheel made of it give: three packages with their data, that
work in a fresh environment without the checkout."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import jaxserve

pytestmark = [pytest.mark.slow, pytest.mark.long]

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxserve", "pallas_kernels", "converters")

PROGRAM = """
import importlib.metadata, importlib.resources, json, sys
sys.modules["torch"] = None  # as if it were not installed: it is no run-time dependency
import converters, jaxserve, pallas_kernels
import pallas_kernels.tuning

report = {
    "files": [package.__file__ for package in (converters, jaxserve, pallas_kernels)],
    "versions": [importlib.metadata.version("jaxserve"), jaxserve.VERSION],
    "tuning": {
        file.name: json.loads(file.read_text(encoding="utf-8"))
        for file in importlib.resources.files("pallas_kernels.tuning").iterdir()
        if file.name.endswith(".json")
    },
    "tables": len(pallas_kernels.tuning.tables()),
}
params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
with jaxserve.Engine(model_path=sys.argv[1], max_total_tokens=1024) as engine:
    report["output"] = engine.generate("The capital of France is", params)["output_ids"]
print(json.dumps(report))
"""


@dataclasses.dataclass(frozen=True)
class Installed:
    """An environment with the wheel and nothing else."""

    python: Path
    site: Path
    """Its site-packages."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is: source distribution, then the wheel
    from that, which so lacks what the former lacks."""
    source, made, home = (tmp_path_factory.mktemp(name) for name in ("source", "made", "venv"))
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", made, source)
    [sdist], [wheel] = made.glob("*.tar.gz"), made.glob("*.whl")
    assert sdist.name == f"jaxserve-{jaxserve.__version__}.tar.gz"
    assert wheel.name.endswith("-py3-none-any.whl")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    [site] = home.glob("lib/python*/site-packages")
    return Installed(python, site)


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_wheel_works_without_the_checkout(installed, tiny_models, tmp_path):
    """Its dependencies are those of these tests, found by their path; an editable install in there
    is not, because Python reads no .pth files of such folders."""
    model = tiny_models("llama")
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = (installed.python, "-W", "error", "-c", PROGRAM, model)
    report = json.loads(run(*command, cwd=tmp_path, env=environment))
    for file in report["files"]:
        assert Path(file).is_relative_to(installed.site), "not the wheel's"
    assert report["versions"] == [jaxserve.__version__] * 2
    ours = (CHECKOUT / "pallas_kernels" / "tuning").glob("*.json")
    expected = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in ours}
    assert expected and report["tuning"] == expected
    assert report["tables"] == len(expected)
    assert len(report["output"]) == 8


def test_the_wheel_holds_every_module_and_nothing_else(installed):
    def modules(folder):
        files = (f for package in PACKAGES for f in (folder / package).rglob("*") if f.is_file())
        return {f.relative_to(folder) for f in files if "__pycache__" not in f.parts}

    there = modules(installed.site)
    assert there == modules(CHECKOUT)
    assert {Path(package, "py.typed") for package in PACKAGES} <= there
    others = {entry.name for entry in installed.site.iterdir()} - set(PACKAGES)
    assert all(name.startswith("jaxserve-") and name.endswith(".dist-info") for name in others)
    assert list(installed.site.glob("*.dist-info/licenses/LICENSE"))
