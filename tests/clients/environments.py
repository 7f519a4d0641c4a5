"""Environments of their own for packages that the tests' own does not have."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def environment(folder: Path, packages: Sequence[str], extra: str = "") -> Path:
    """The Python of an environment with these packages and this checkout, made the first time and
    made anew when the packages have changed. extra: of this checkout, as in "[ray]". Raises
    CalledProcessError, after pip has said why."""
    python = folder / "bin" / "python"
    stamp = folder / "pins"
    pins = "\n".join([*packages, f"{ROOT}{extra}"])
    if stamp.exists() and stamp.read_text() == pins:
        return python
    print(f"{folder.name}: installing {', '.join(packages)}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages, "--editable", f"{ROOT}{extra}"], check=True)
    stamp.write_text(pins)
    return python
