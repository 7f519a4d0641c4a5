"""The engine that programs written for SGLang get."""

from __future__ import annotations

import copy
from typing import Any

import jaxserve.engine
from jaxserve.server_args import ServerArgs

CUDA = ("cuda", "cuda:0")
"""Spellings of the device, PyTorch's included, in strings and torch.device objects."""
CUDA_OR_CPU = "cuda,cpu"


class Engine(jaxserve.engine.Engine):
    """`jaxserve.Engine` for programs that say device="cuda" because SGLang knows little else:
    here that is CUDA where JAX has it, and the CPU, with a warning, elsewhere."""

    def __init__(self, model_path: str | None = None, **kwargs: Any) -> None:
        given = kwargs.get("server_args")
        if isinstance(given, ServerArgs) and given.device in CUDA:
            given = copy.copy(given)
            given.device = CUDA_OR_CPU
            kwargs["server_args"] = given
        elif str(kwargs.get("device")) in CUDA:
            kwargs["device"] = CUDA_OR_CPU
        super().__init__(model_path, **kwargs)
