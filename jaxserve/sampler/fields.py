"""What the device knows about each row: one table, from which the packed vector of an extend step,
its padding, the initial state and the columns that the sampler reads all follow. No jax."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxserve.packing.sequence import Sequence


class Field(NamedTuple):
    """One number of each row, written when a request is admitted."""

    name: str
    """The column's; one of `pallas_kernels.SampleRows` goes to the sampling kernel."""
    dtype: type[np.float32] | type[np.int32]
    """Of the column: those of one dtype are side by side in one array."""
    neutral: float
    """Of rows of padding and of empty slots."""
    read: str = ""
    """Dotted path of the value, from a `batch.Sequence`; "": neutral, unless an extra of the
    request says otherwise (`output.extras.Extra.fields`). (One attrgetter reads all of them: a call
    of a Python function for each would cost a row its own microsecond.)"""
    transform: str = ""
    """Module of a function `transform(logits [B, V] float32, values [B]) -> logits`, by which the
    sampler changes logits before its kernel sees them, in the order of the table. Rows that have
    the neutral value it leaves bitwise as they are. "" is none."""


FIELDS = (
    Field("temperature", np.float32, 1.0, "request.params.temperature"),
    Field("top_p", np.float32, 1.0, "request.params.top_p"),
    Field("min_p", np.float32, 0.0, "request.params.min_p"),
    Field("frequency", np.float32, 0.0, "request.params.frequency_penalty"),
    Field("presence", np.float32, 0.0, "request.params.presence_penalty"),
    Field("repetition", np.float32, 1.0, "request.params.repetition_penalty"),
    Field("top_k", np.int32, 1, "request.params.top_k"),
    Field("seed", np.int32, 0, "request.seed_bits"),
    Field("sample_index", np.int32, 0, "request.sample_index"),
    Field("prompt_len", np.int32, 0, "prompt_len"),
    Field("position_delta", np.int32, 0, "request.position_delta"),
    Field("num_bias", np.int32, 0, "request.num_bias"),
    Field("wants_logprob", np.int32, 0),
    Field("num_top", np.int32, 0),
    Field("num_named", np.int32, 0),
)


class Columns:
    """The fields of one dtype, as the columns of an array [.., len(names)]: first those that are
    read of every request."""

    def __init__(self, dtype: type[np.float32] | type[np.int32]) -> None:
        fields = [field for field in FIELDS if field.dtype is dtype]
        fields.sort(key=lambda field: not field.read)
        paths = [field.read for field in fields if field.read]
        self.names = tuple(field.name for field in fields)
        self.neutral = np.array([field.neutral for field in fields], dtype)
        self.read: Callable[[Sequence], Any] = attrgetter(*paths)
        """The first values of a sequence's row, a tuple in the order of `names`."""
        self.unread = tuple(self.neutral[len(paths) :].tolist())
        """The others, where no extra says otherwise."""

    def __len__(self) -> int:
        return len(self.names)


FLOATS, INTS = Columns(np.float32), Columns(np.int32)
