"""The base of logit processors, with SGLang's names and meaning."""

from __future__ import annotations

import abc
import functools
import importlib
import json
from typing import Any, Self

import numpy as np

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError


class CustomLogitProcessor(abc.ABC):
    """Changes logits on the host, before each token of the requests that ask for it. A request has
    an instance of its own, made without arguments, so that one may remember things; an object that
    is given to `generate` serves all of the call's requests."""

    @abc.abstractmethod
    def __call__(
        self, logits: np.ndarray, custom_param_list: list[dict[str, Any]] | None = None
    ) -> np.ndarray:
        """logits [1, V] float32, after penalties, biases and grammars, which may be written to;
        custom_param_list: one dict, the request's `custom_params` and, as "__req__", an object with
        `origin_input_ids` and `output_ids`. Returns the logits [1, V] as they are to be."""

    @classmethod
    def to_str(cls) -> str:
        """The class as a string that `generate` takes, in this process or another one.
        NotSupportedError without the dill package."""
        return json.dumps({"callable": _dill("to_str()").dumps(cls).hex()})

    @classmethod
    def from_str(cls, text: str) -> Self:
        """An instance of the class that `to_str` made `text` of. It runs what the string says: not
        for strings of strangers. InvalidRequestError: it is none."""
        return _class_of(text)()


@functools.lru_cache(maxsize=256)
def _class_of(text: str) -> Any:
    dill = _dill("custom_logit_processor as a string")
    try:
        return dill.loads(bytes.fromhex(json.loads(text)["callable"]))
    except Exception as error:
        raise InvalidRequestError(
            f"custom_logit_processor is no string of CustomLogitProcessor.to_str(): "
            f"{type(error).__name__}: {error}, got {checks.shown(text)}"
        ) from error


def _dill(what: str) -> Any:
    try:
        return importlib.import_module("dill")
    except ImportError as error:
        raise NotSupportedError(
            f"{what} needs the dill package: pip install jaxserve[processors]"
        ) from error
