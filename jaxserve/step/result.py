"""What goes into one step and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.chains.entries import Entries
from jaxserve.output.picked import Picked, on_host
from jaxserve.packing.batch import Batch
from jaxserve.packing.pack import SparseArrays
from jaxserve.step.picture_steps import Queued


class Prepared(NamedTuple):
    """A batch and what it sends to the device; nothing has touched the device yet."""

    batch: Batch
    upload: np.ndarray
    sparse: tuple[tuple[int, SparseArrays], ...] = ()
    chained: Entries | None = None
    """What the device is told of rows with chains before the step; None: nothing."""
    pictures: tuple[Queued, ...] = ()
    """What puts its pictures on the device."""


class Part(NamedTuple):
    """What one program has drawn, on its way to the host."""

    rows: np.ndarray | None
    """[k] int32: the rows that count; None: all."""
    tokens: jax.Array
    """[n, B] int32 of n steps."""
    payloads: Mapping[str, jax.Array]
    """What the batch's requests want of the tokens: by name, [n, B, ...]."""


class StepResult(NamedTuple):
    """Device arrays that are on their way to the host."""

    batch: Batch
    parts: tuple[Part, ...]
    """Of the same n, B and payloads."""
    prompt_payloads: Mapping[str, jax.Array | Picked]
    """And of their prompts: [T, ...], by packed token."""
    accepted: jax.Array | None = None
    """[B] int32: how many of a decode batch's n tokens each row has, the first ones; None: all."""
    picked: Mapping[str, Picked] = MappingProxyType({})
    """Payloads of which only the rows are copied that somebody reads."""
    kept: Mapping[str, jax.Array] = MappingProxyType({})
    """What stays on the device, for requests that end: by name, [n, B, ...]."""

    @property
    def arrays(self) -> list[jax.Array]:
        """All that the host reads."""
        found = [] if self.accepted is None else [self.accepted]
        for part in self.parts:
            found += (part.tokens, *part.payloads.values())
        for payload in (*self.picked.values(), *self.prompt_payloads.values()):
            found += payload.pieces if isinstance(payload, Picked) else (payload,)
        return found

    def wait(self) -> None:
        """Until the results are on the host. Raises what went wrong on the device."""
        for array in self.arrays:
            np.asarray(array)  # kept by the array

    def drawn(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The tokens [n, B] and payloads [n, B, ...] of all parts. Waits for the device."""
        first, *others = self.parts
        tokens = np.asarray(first.tokens)
        payloads: dict[str, Any] = {n: np.asarray(array) for n, array in first.payloads.items()}
        picked = {name: on_host(rows) for name, rows in self.picked.items()}
        if not others:
            return tokens, payloads | picked
        tokens, payloads = tokens.copy(), {name: x.copy() for name, x in payloads.items()}
        for part in others:
            tokens[:, part.rows] = np.asarray(part.tokens)[:, part.rows]
            for name, array in part.payloads.items():
                payloads[name][:, part.rows] = np.asarray(array)[:, part.rows]
        return tokens, payloads | picked
