"""Compiled programs kept on disk whole, so that a later start neither traces, lowers nor compiles.

JAX's own compilation cache spares the compilation only; tracing and lowering the kernels holds the
interpreter lock for seconds a program. Like that cache, the folder holds code that will be run
(and pickles, which JAX makes of executables): nobody else may write to it (`folders.py`), and what
was damaged is not even unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxserve.compat import find_mosaic_runtime, load_executable, settings, versions
from jaxserve.step.shared import Folder

logger = logging.getLogger(__name__)

UNUSED_SECONDS = 14 * 24 * 3600
"""Programs that no start has used for so long are deleted."""
DIGEST_BYTES = hashlib.sha256().digest_size


class StoredPrograms:
    """Executables in `folder`, for `mesh` and a program that `facts` determine together with its
    arguments: everything else that could change what is compiled goes into the file's name. Which
    devices of a kind compiled it does not: it is loaded for those of `mesh`."""

    def __init__(self, folder: Folder, mesh: Mesh, facts: Iterable[Any]):
        self._folder = folder
        self._warned = False
        self._devices = list(mesh.devices.flat)
        first = self._devices[0]
        self._common = "\n".join(
            [
                versions(),
                settings(),
                os.environ.get("XLA_FLAGS", ""),
                first.device_kind,
                first.client.platform_version,
                repr(mesh.shape),
                _sources(),
                *map(repr, facts),
            ]
        )

    def name(self, name: str, abstract: Any, donated: Any, options: Any) -> str:
        """Of the file in which the program of these (abstract) arguments is, or would be."""
        leaves, tree = jax.tree.flatten(abstract)
        # hundreds of parameters have the same few: their texts take four times all the rest
        kinds = {x for leaf in leaves for x in (leaf.dtype, leaf.sharding)}
        texts = {x: repr(x) for x in kinds}
        shapes = [(leaf.shape, texts[leaf.dtype], texts[leaf.sharding]) for leaf in leaves]
        text = "\n".join(
            [self._common, name, repr(shapes), str(tree), repr(donated), repr(options)]
        )
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def has(self, name: str) -> bool:
        """Whether there is such a file. Only `load` knows whether it can be used."""
        return self._folder.has(name)

    def load(self, name: str, options: Mapping[str, Any]) -> tuple[Any, int] | None:
        """(program, bytes of its temporaries), or None where there is none that can be used.
        options: of the compiler, as they were for this program."""
        try:
            content = self._folder.read(name)
            if content is None:
                return None
            find_mosaic_runtime()
            *serialized, places, memory = pickle.loads(_verified(name, content))
            program = load_executable(serialized, places, self._devices, options)
            self._folder.touch(name)
        except Exception as error:
            self._warn("a stored program cannot be used and is compiled anew", error)
            return None
        return program, memory

    def store(self, name: str, program: Any, memory: int) -> None:
        """Keep a program. A failure (a full disk, say) is logged: the engine works without."""
        try:
            places = [device.id for device in self._devices]
            content = pickle.dumps((*serialize_executable.serialize(program), places, memory))
            self._folder.write(name, hashlib.sha256(content).digest() + content)
        except Exception as error:
            self._warn("a program could not be stored", error)

    def prune(self) -> None:
        """Delete what has not been used for long."""
        try:
            self._folder.prune(unused_seconds=UNUSED_SECONDS)
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn("stored programs cannot be used", error)

    def _warn(self, what: str, error: Exception) -> None:
        """Once: what is wrong with one program is usually wrong with all."""
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(level, "%s: %s (compilation_cache_dir chooses the folder)", what, error)


def _verified(name: str, content: bytes) -> bytes:
    """What follows the SHA-256 at a file's beginning. ValueError: it is not what was stored."""
    stored, program = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(program).digest() != stored:
        raise ValueError(f"{name} is damaged: its SHA-256 is another")
    return program


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
