"""The environment of processes that tests start, in which most of the time is imports and XLA."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_START = ROOT / "tests" / "at_start"


def environment(**more: str) -> dict[str, str]:
    """Of this process, and `more`. Engines keep whole programs, as `kept_programs` has it, and
    there is no PyTorch, which transformers would import and jaxserve does not need."""
    path = os.pathsep.join([str(AT_START), str(ROOT), os.environ.get("PYTHONPATH", "")])
    path = path.rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""} | more
