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
    """Device arrays that are on their way to the host: tokens [n, B] int32 of n steps, the sampled
    rows' logprobs [n, B, X] and the packed tokens' input logprobs [T, X] where somebody wants them
    (see pack.unpack_logprobs). top: columns of the best logprobs."""

    batch: Batch
    tokens: jax.Array
    logprobs: jax.Array | None
    input_logprobs: jax.Array | None
    top: int

    def wait(self) -> None:
        """Until the results are on the host. Raises what went wrong on the device."""
        for array in (self.tokens, self.logprobs, self.input_logprobs):
            if array is not None:
                np.asarray(array)  # kept by the array
