"""Named ids for the steps of requests that want more columns than the usual programs have."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxserve.packing.batch import Batch


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
        named_by = ((s.slot, s.request.named_ids) for s in batch.sequences)
        rows = [(slot, ids) for slot, ids in named_by if ids]
        if rows != self._rows:
            named = np.zeros(self._shape, np.int32)
            for slot, ids in rows:
                named[slot, : len(ids)] = ids
            self._rows, self._array = rows, jax.device_put(named, self._sharding)
        return self._array
