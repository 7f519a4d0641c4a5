"""Named ids for the steps of requests that want more logprobs than the usual programs report."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxserve.batch.batch import Batch

WIDE = "_wide"
"""Ends the kind of a program with more columns of logprobs, see config.WIDE_TOP."""


class WideIds:
    """The rows' ids, placed by `sharding`: [R+1, I] int32, R `slots`, I `width`. Uploaded anew only
    when the rows change; usual programs have theirs in the device's state instead, a row at a time.
    """

    def __init__(self, slots: int, width: int, sharding: Sharding):
        self._shape = slots + 1, width
        self._sharding = sharding
        self._rows: Any = None
        self._array: Any = None

    def of(self, batch: Batch) -> jax.Array:
        """Ids of the batch's rows, in the order that each asked for them in, padded with 0."""
        specs = ((s.slot, s.request.logprobs) for s in batch.sequences)
        rows = [(slot, spec.ids) for slot, spec in specs if spec is not None]
        if rows != self._rows:
            named = np.zeros(self._shape, np.int32)
            for slot, ids in rows:
                named[slot, : len(ids)] = ids
            self._rows, self._array = rows, jax.device_put(named, self._sharding)
        return self._array
