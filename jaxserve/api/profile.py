"""`Engine.start_profile`: its arguments checked, its folder made. No jax."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError

FOLDER_VARIABLE = "JAXSERVE_PROFILER_DIR"
ACTIVITIES = ("CPU", "GPU")
LONGEST_PATH, LONGEST_NAME = 4096, 128
"""Characters, of a folder and of what is put into the name of one."""
FOREIGN_ACTIVITIES = ("MEM", "RPD", "CUDA_PROFILER", "XPU")


@dataclasses.dataclass(frozen=True, slots=True)
class ProfileSpec:
    """What to trace, and where to. (The device is always in it: JAX has no switch for that.)"""

    folder: str
    """Exists, and may be given to TensorBoard or xprof."""
    name: str
    """Of the trace's own folder, below plugins/profile in `folder`."""
    first_step: int
    """The trace begins once that many steps have run."""
    steps: int | None
    """How many it is to hold; None: until stop_profile."""
    host: bool
    """The loop's phases are in it."""
    python: bool
    """Python's calls are."""
    hlo: bool
    """The programs are, with the shapes of their operations."""

    @classmethod
    def make(
        cls,
        *,
        output_dir: str | os.PathLike[str] | None,
        start_step: int | None,
        num_steps: int | None,
        activities: Sequence[str] | None,
        with_stack: bool | None,
        record_shapes: bool | None,
        profile_id: str | None,
        profile_prefix: str | None,
        **others: Any,
    ) -> ProfileSpec:
        """Checks the arguments of `Engine.start_profile`, and makes the folder.

        Raises InvalidRequestError, and NotSupportedError for activities of other profilers and for
        `others` that are given.
        """
        for argument, value in others.items():
            if value is not None and value is not False:
                raise NotSupportedError(f"{argument}={checks.shown(value)} is not supported yet")
        first = 0 if start_step is None else checks.integer("start_step", start_step, 0)
        steps = None if num_steps is None else checks.integer("num_steps", num_steps, 1)
        kinds = _activities(activities)
        name = _name("profile_id", profile_id) if profile_id is not None else str(time.time())
        if profile_prefix is not None:
            name = f"{_name('profile_prefix', profile_prefix)}-{name}"
        python = with_stack is not None and checks.boolean("with_stack", with_stack)
        hlo = record_shapes is None or checks.boolean("record_shapes", record_shapes)
        folder = _folder(output_dir)
        if (Path(folder) / "plugins" / "profile" / name).exists():
            raise InvalidRequestError(f"output_dir={folder!r} has a profile {name!r} already")
        return cls(folder, name, first, steps, "CPU" in kinds, python, hlo)


def _activities(given: Any) -> tuple[str, ...]:
    if given is None:
        return ACTIVITIES
    kinds = checks.strings("activities", given)
    for kind in kinds:
        if kind in FOREIGN_ACTIVITIES:
            raise NotSupportedError(f"activities={kind!r} is not supported: JAX has CPU and GPU")
        if kind not in ACTIVITIES:
            raise InvalidRequestError(f"activities must be of CPU and GPU, got {kind!r}")
    if not kinds:
        raise InvalidRequestError(f"activities must name CPU, GPU or both, got {given!r}")
    return kinds


def _name(argument: str, value: Any) -> str:
    """A part of the name of a folder."""
    checks.text(argument, value, LONGEST_NAME)
    if not value or value in (".", "..") or {*"/\\\0"} & {*value}:
        raise InvalidRequestError(
            f"{argument} must be a string that can name a file, got {checks.shown(value)}"
        )
    return value


def _folder(output_dir: Any) -> str:
    name, given = "output_dir", output_dir
    if given is None or (isinstance(given, str) and not given):
        name, given = FOLDER_VARIABLE, os.environ.get(FOLDER_VARIABLE)
    if given is None:
        return tempfile.mkdtemp(prefix="jaxserve-profile-")
    path = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(path, str):
        raise InvalidRequestError(f"{name} must be a path, got {checks.shown(given)}")
    checks.text(name, path, LONGEST_PATH)
    folder = os.path.abspath(os.path.expanduser(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise InvalidRequestError(f"{name}={folder!r} cannot be written to: {error}") from error
