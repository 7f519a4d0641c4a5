"""`python -m tests.clients [NAME ...]`: runs the checks of these clients, or of all.

Each client has an environment of its own under .cache/clients, made the first time from pins.toml
and made anew when its pins have changed. What cannot be installed is named with pip's own words.
Needs PyPI for the first run only; the checks themselves are offline, on the demo model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from examples.demo_model import fetch
from tests.clients.environments import ROOT, environment

HERE = Path(__file__).resolve().parent
CACHE = ROOT / ".cache" / "clients"
PINS = tomllib.loads((HERE / "pins.toml").read_text(encoding="utf-8"))
SECONDS = 3600
"""For a check; on a free machine each takes a few minutes."""
UNDER_ALIAS = ("ray", "lighteval", "swift")
"""Whose check imports the client. (lm_eval's runs its command line, with and without.)"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def model() -> Path:
    """The demo model as safetensors, which a client's own backend can read too."""
    folder = CACHE / "model"
    if not (folder / "config.json").exists():
        convert = [sys.executable, "-m", "converters", str(fetch()), str(folder)]
        subprocess.run([*convert, "--format", "safetensors"], check=True, cwd=ROOT)
    return folder


def check(name: str) -> bool:
    """Whether the client's numbers are right; its check prints them."""
    try:
        python = environment(CACHE / name, PINS[name]["packages"])
    except subprocess.CalledProcessError as error:
        print(f"{name}: NOT INSTALLED, pip ended with status {error.returncode}")
        return False
    alias = ["-m", "jaxserve.sglang_alias"] if name in UNDER_ALIAS else []
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch:
        command = [str(python), *alias, str(HERE / f"check_{name}.py"), str(model()), scratch]
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT, cwd=scratch, timeout=SECONDS, check=False
        )
    return done.returncode == 0


def main(names: list[str]) -> int:
    unknown = set(names) - set(PINS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PINS)}")
        return 2
    passed = {name: check(name) for name in names or PINS}
    print("\n".join(f"{name}: {'passed' if right else 'FAILED'}" for name, right in passed.items()))
    return not all(passed.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
