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
from jaxserve.folders import PrivateFolder
from jaxserve.step.shared import Folder
from jaxserve.step.xla_options import Options

logger = logging.getLogger(__name__)

UNUSED_SECONDS = 14 * 24 * 3600
"""Programs that no start has used for so long are deleted."""
DIGEST_BYTES = hashlib.sha256().digest_size


class StoredPrograms:
    """Executables in `folder`, for `mesh` and a program that `facts` determine together with its
    arguments: everything else that could change what is compiled goes into the file's name. Which
    devices of a kind compiled it does not: it is loaded for those of `mesh`.

    Beside them lie the kernels that XLA chose by timing, in files of its own: programs that are
    compiled later, in whatever process, find them.
    """

    def __init__(self, folder: Folder, mesh: Mesh, facts: Iterable[Any], chooses: bool = False):
        """chooses: XLA times kernels to choose among them."""
        self._folder = folder
        self._choices: Path | None = None
        if chooses and isinstance(folder, PrivateFolder):
            self._choices = folder.path / f"choices-{_digest(versions())[:16]}"
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
        return f"{name}-{_digest(text)[:32]}"

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

    def choices(self, *, keep: bool) -> Options:
        """Options of the compiler with which it uses choices that it has made before. keep: and
        keeps those that it makes. A folder that cannot be used is named in a warning."""
        if self._choices is None:
            return {}
        try:
            PrivateFolder(self._choices).create()
        except OSError as error:
            self._warn("what XLA chooses cannot be stored", error)
            return {}
        mode = "UPDATE" if keep else "READ"
        return {
            "xla_gpu_per_fusion_autotune_cache_dir": str(self._choices),
            "xla_gpu_experimental_autotune_cache_mode": f"AUTOTUNE_CACHE_MODE_{mode}",
        }

    def note(self, name: str) -> None:
        """The choices for the program of this name are made."""
        if self._choices is not None:
            try:
                PrivateFolder(self._choices).write(name, b"")
            except OSError as error:
                self._warn("what XLA chose could not be stored", error)

    def noted(self, name: str) -> bool:
        """Whether `note` was told so, in this process or another."""
        return self._choices is not None and PrivateFolder(self._choices).has(name)

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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
