"""LLM inference in JAX with SGLang's offline Engine API.

The names below are imported on first use, so that modules without JAX stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import jaxserve.process  # noqa: F401  (from now on, forks are noted)

__version__ = "0.1.0"
"""The one place: pyproject.toml reads it."""
VERSION = __version__

if TYPE_CHECKING:
    from jaxserve import utils
    from jaxserve.engine import Engine
    from jaxserve.errors import (
        CopyError,
        EngineDeadError,
        EngineShutdownError,
        ForkedProcessError,
        HandleLostError,
        InvalidRequestError,
        JaxserveError,
        ModelLoadError,
        NotSupportedError,
        OutOfPagesError,
        ProfileError,
        RequestFailedError,
        UnknownOptionError,
    )
    from jaxserve.processors.processor import CustomLogitProcessor
    from jaxserve.sampling_params import SamplingParams
    from jaxserve.server_args import ServerArgs

__all__ = [
    "CopyError",
    "CustomLogitProcessor",
    "Engine",
    "EngineDeadError",
    "EngineShutdownError",
    "ForkedProcessError",
    "HandleLostError",
    "InvalidRequestError",
    "JaxserveError",
    "ModelLoadError",
    "NotSupportedError",
    "OutOfPagesError",
    "ProfileError",
    "RequestFailedError",
    "SamplingParams",
    "ServerArgs",
    "UnknownOptionError",
    "__version__",
    "utils",
]

_HOMES = {
    "CustomLogitProcessor": "processors.processor",
    "Engine": "engine",
    "SamplingParams": "sampling_params",
    "ServerArgs": "server_args",
}


def __getattr__(name: str) -> Any:
    if name == "utils":
        return importlib.import_module("jaxserve.utils")
    if name not in __all__:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxserve.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
