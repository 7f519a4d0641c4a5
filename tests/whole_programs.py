"""Where the engines of a test keep whole programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxserve.config import EngineConfig


def keep_programs(patch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Engines store whole programs in `folder`, as those on a GPU do; None: nowhere."""
    resolve = EngineConfig.resolve

    def resolved(*args):
        return dataclasses.replace(resolve(*args), program_folder=folder)

    patch.setattr(EngineConfig, "resolve", resolved)
