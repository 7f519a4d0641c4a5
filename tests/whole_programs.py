"""Where the engines of a test keep whole programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    import pytest


def keeping(folder: Path | None) -> Callable[..., EngineConfig]:
    """`EngineConfig.resolve` with engines that store whole programs in `folder`, as those on a GPU
    do; None: nowhere."""
    resolve = EngineConfig.resolve

    def resolved(*args):
        return dataclasses.replace(resolve(*args), program_folder=folder)

    return resolved


def keep_programs(patch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """So in this process."""
    patch.setattr(EngineConfig, "resolve", keeping(folder))
