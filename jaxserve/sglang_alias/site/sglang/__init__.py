"""jaxserve under the name of SGLang: its offline engine, not its server or frontend language."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxserve.sglang_alias import VERSION as __version__

if TYPE_CHECKING:
    from jaxserve import utils
    from jaxserve.server_args import ServerArgs
    from jaxserve.sglang_alias.engine import Engine

__all__ = ["Engine", "ServerArgs", "__version__", "utils"]

_HOMES = {"Engine": "srt.entrypoints.engine", "ServerArgs": "srt.server_args", "utils": "utils"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"jaxserve, which is here as 'sglang', has no {name!r}")
    module = importlib.import_module(f"sglang.{_HOMES[name]}")
    return module if name == "utils" else getattr(module, name)
