"""What goes into one step and what comes out of it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from jaxserve.batch.batch import Batch
from jaxserve.batch.pack import SparseArrays


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
    logprobs: jax.Array | None
    """[n, B, X] packed, of the sampled rows, where somebody wants them: pack.unpack_logprobs."""
    input_logprobs: jax.Array | None
    """[T, X], of the packed tokens, where somebody wants them."""
    top: int
    """Columns of the best logprobs."""
    accepted: jax.Array | None = None
    """[B] int32: how many of a decode batch's n tokens each row has, the first ones; None: all."""

    def wait(self) -> None:
        """Until the results are on the host. Raises what went wrong on the device."""
        for array in (self.tokens, self.logprobs, self.input_logprobs, self.accepted):
            if array is not None:
                np.asarray(array)  # kept by the array
