"""What goes into one step and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.packing.batch import Batch
from jaxserve.packing.pack import SparseArrays


class Prepared(NamedTuple):
    """A batch and what it sends to the device; nothing has touched the device yet."""

    batch: Batch
    upload: np.ndarray
    sparse: tuple[tuple[int, SparseArrays], ...] = ()


class StepResult(NamedTuple):
    """Device arrays that are on their way to the host."""

    batch: Batch
    tokens: jax.Array
    """[n, B] int32 of n steps."""
    payloads: Mapping[str, jax.Array]
    """What the batch's requests want of the tokens: by name, [n, B, ...]."""
    prompt_payloads: Mapping[str, jax.Array]
    """And of their prompts: [T, ...], by packed token."""
    accepted: jax.Array | None = None
    """[B] int32: how many of a decode batch's n tokens each row has, the first ones; None: all."""

    @property
    def arrays(self) -> list[jax.Array]:
        """All that the host reads."""
        accepted = () if self.accepted is None else (self.accepted,)
        return [self.tokens, *self.payloads.values(), *self.prompt_payloads.values(), *accepted]

    def wait(self) -> None:
        """Until the results are on the host. Raises what went wrong on the device."""
        for array in self.arrays:
            np.asarray(array)  # kept by the array
