"""What the runners of one engine's replicas have in common beside their configuration."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from jaxserve.folders import PrivateFolder
from jaxserve.step.catalogue import ProgramKey
from jaxserve.step.notice import Notice


class MemoryFolder:
    """As much of `PrivateFolder` as programs need, in memory."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> bytes | None:
        return self._files.get(name)

    def write(self, name: str, content: bytes) -> None:
        self._files[name] = content

    def touch(self, name: str) -> None:
        """Nothing is ever pruned here."""

    def prune(self, *, unused_seconds: float) -> None:
        """As `touch`."""


Folder = PrivateFolder | MemoryFolder


class Turns:
    """Who compiles what, of several that would compile the same, and what users hear of it."""

    def __init__(self) -> None:
        self.notice = Notice()
        self._locks: dict[ProgramKey, threading.Lock] = {}
        self._claims: dict[ProgramKey, object] = {}

    def of(self, key: ProgramKey) -> threading.Lock:
        """To hold while the program is looked for and compiled: whoever comes second finds it."""
        return self._locks.setdefault(key, threading.Lock())

    def claim(self, key: ProgramKey) -> bool:
        """Whether the caller is the first to ask, of a program that is compiled for what XLA learns
        by it and remembers for all devices of a kind."""
        mine = object()
        return self._claims.setdefault(key, mine) is mine


class Shared:
    """Programs are compiled by one runner, for its own devices, and loaded by the others for
    theirs. Pools are as large as fits on each of all devices."""

    def __init__(self, devices: list[Any]) -> None:
        """devices: jax.Devices of all runners."""
        self.devices = devices
        self.turns = Turns()
        self._memory = MemoryFolder()

    def folder(self, path: Path | None) -> Folder:
        """Where compiled programs are kept: in `path`, or as long as the engine lives."""
        return self._memory if path is None else PrivateFolder(path)
