"""What one request has of a registered chain, or hook. No jax."""

from __future__ import annotations

import hashlib
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxserve.chains.spec import ParamSpec
from jaxserve.output.extras import Collected, Extra, ExtraSpec, Reported, View
from jaxserve.output.logprobs import Columns


class Registered(NamedTuple):
    """A chain, or a hook, as the host knows it."""

    kind: str
    """Of the programs that draw with it: chains whose functions are the same share them."""
    spec: ParamSpec
    """Its parameters."""
    reads_history: bool
    """Its rows' tokens lie on the device, beside their keys and values."""
    reads_logprobs: bool
    """`observe` uses the logprobs of tokens."""
    fused: bool = False
    """Decode programs draw with it."""


class ChainUse(NamedTuple):
    """With one request's parameters."""

    chain: Registered
    floats: np.ndarray
    """[F] float32."""
    ints: np.ndarray
    """[I] int32."""

    @property
    def digest(self) -> str:
        """The same for the same functions and parameters alone."""
        parts = (self.chain.kind.encode(), self.floats.tobytes(), self.ints.tobytes())
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


class DrawnLogprobs(Extra[list[float]]):
    """Keeps the logprobs of a request's tokens, so that `observe` can be told of them again when
    the request is resumed. Its caller gets none of them."""

    name = "logprobs"
    fields = MappingProxyType({"wants_logprob": 1})

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[float] = []
        """Of all tokens so far."""

    def empty(self) -> list[float]:
        return []

    @staticmethod
    def open(array: np.ndarray) -> Columns:
        return Columns.of(array)

    def read(self, reported: Reported, row: int) -> None:
        self.kept.append(reported.of(self).chosen.item(row))

    def values(self, opened: Columns, start: int, count: int) -> list[float]:
        return []

    def as_meta(self, collected: Collected, first: int, view: View) -> dict[str, Any]:
        return {}


class DrawnLogprobsSpec(ExtraSpec):
    """Of requests with a chain that reads logprobs."""

    def extra(self, prompt_len: int) -> DrawnLogprobs:
        return DrawnLogprobs()
