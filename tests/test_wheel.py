"""What `pip install` of the wheel gives: three packages with their data, that work without the
checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's contents. Built from a copy: the checkout stays as it is."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "out", "site"))
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    [wheel] = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_wheel_works_without_the_checkout(installed, tiny_models, tmp_path):
    model = tiny_models("llama")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    printed = run(
        sys.executable, "-W", "error", "-c", PROGRAM, model, cwd=tmp_path, env=environment
    )
    report = json.loads(printed)
    for file in report["files"]:
        assert Path(file).is_relative_to(installed), "not the wheel's"
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    assert report["versions"] == [version, version]
    ours = (CHECKOUT / "pallas_kernels" / "tuning").glob("*.json")
    expected = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in ours}
    assert expected and report["tuning"] == expected
    assert report["tables"] == len(expected)
    assert len(report["output"]) == 8


def test_the_wheel_holds_every_module_and_nothing_else(installed):
    def modules(folder):
        files = (f for package in PACKAGES for f in (folder / package).rglob("*") if f.is_file())
        return {f.relative_to(folder) for f in files if "__pycache__" not in f.parts}

    assert modules(installed) == modules(CHECKOUT)
    others = {entry.name for entry in installed.iterdir()} - set(PACKAGES)
    assert all(name.startswith("jaxserve-") and name.endswith(".dist-info") for name in others)
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))
