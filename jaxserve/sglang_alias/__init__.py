"""jaxserve under the name `sglang`, for programs that import that: docs/from_sglang.md.

`site/` holds a small package `sglang` and its metadata, as site-packages would. With that folder on
the module path, imports, `importlib.metadata` and `find_spec` work as with any installed package:
no import hook, nothing patched.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from jaxserve.errors import NotSupportedError

VERSION = "0.5.15+jaxserve"
"""Of the package `sglang`: the release whose names the alias knows."""
FOLDER = str(Path(__file__).resolve().parent / "site")


def install() -> None:
    """Makes `import sglang` mean jaxserve, in this process and in those it starts (they inherit
    PYTHONPATH). An SGLang that is installed too is hidden.

    Raises NotSupportedError when another `sglang` has been imported already.
    """
    loaded = sys.modules.get("sglang")
    if loaded is not None and not _is_ours(loaded):
        raise NotSupportedError(
            f"sglang is already imported, from {_origin(loaded)}: install the alias before that"
        )
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    inherited = os.environ.get("PYTHONPATH")
    if FOLDER not in _entries(inherited):
        os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER, *_entries(inherited)])
    importlib.invalidate_caches()


def uninstall() -> None:
    """Undoes `install`. Objects that were imported under the name stay what they are."""
    sys.path[:] = [entry for entry in sys.path if entry != FOLDER]
    rest = [entry for entry in _entries(os.environ.pop("PYTHONPATH", None)) if entry != FOLDER]
    if rest:
        os.environ["PYTHONPATH"] = os.pathsep.join(rest)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "sglang" and _is_ours(module):
            del sys.modules[name]
    importlib.invalidate_caches()


def _entries(path: str | None) -> list[str]:
    return path.split(os.pathsep) if path else []


def _origin(module: object) -> str:
    return getattr(module, "__file__", None) or "somewhere without a file"


def _is_ours(module: object) -> bool:
    return _origin(module).startswith(FOLDER + os.sep)
