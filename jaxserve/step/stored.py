"""Compiled programs kept on disk whole, so that a later start neither traces, lowers nor compiles.

JAX's own compilation cache spares the compilation only; tracing and lowering the kernels holds the
interpreter lock for seconds a program. Like that cache, the folder holds code that will be run
(and pickles, which JAX makes of executables): it must be the user's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxserve.compat import find_mosaic_runtime, settings, versions

logger = logging.getLogger(__name__)

UNUSED_SECONDS = 14 * 24 * 3600
"""Programs that no start has used for so long are deleted."""


class StoredPrograms:
    """Executables in `folder`, for `device` and a program that `facts` determine together with its
    arguments: everything else that could change what is compiled goes into the file's name."""

    def __init__(self, folder: Path, device: Any, facts: Iterable[Any]):
        self._folder = folder
        self._device = device
        self._common = "\n".join(
            [
                versions(), settings(), os.environ.get("XLA_FLAGS", ""), device.device_kind,
                device.client.platform_version, _sources(), *map(repr, facts),
            ]
        )  # fmt: skip

    def path(self, name: str, abstract: Any, donated: Any, options: Any) -> Path:
        """Where the program of these (abstract) arguments is, or would be."""
        leaves, tree = jax.tree.flatten(abstract)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        text = "\n".join(
            [self._common, name, repr(shapes), str(tree), repr(donated), repr(options)]
        )
        return self._folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def load(self, path: Path) -> tuple[Any, int] | None:
        """(program, bytes of its temporaries), or None where there is none that can be used."""
        if not path.exists():
            return None
        find_mosaic_runtime()
        try:
            content = path.read_bytes()
            serialized, in_tree, out_tree, memory = pickle.loads(content)
            program = serialize_executable.deserialize_and_load(
                serialized, in_tree, out_tree, backend=self._device.client,
                execution_devices=[self._device],
            )  # fmt: skip
            os.utime(path)
        except Exception as error:
            logger.warning("a stored program cannot be used and is compiled anew: %s", error)
            return None
        return program, memory

    def store(self, path: Path, program: Any, memory: int) -> None:
        """Keep a program. A failure (a full disk, say) is logged: the engine works without."""
        try:
            content = pickle.dumps((*serialize_executable.serialize(program), memory))
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(content)
            os.replace(file.name, path)  # never half a program under its name
        except Exception as error:
            logger.warning("a program could not be stored: %s", error)

    def prune(self) -> None:
        """Delete what has not been used for long."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.stat().st_mtime < time.time() - UNUSED_SECONDS:
                    path.unlink()


def _sources() -> str:
    """A digest of the code and the tuning tables that programs are made of."""
    digest = hashlib.sha256()
    for package in ("jaxserve", "pallas_kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        root = Path(spec.submodule_search_locations[0])
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
