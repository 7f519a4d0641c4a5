"""What sampling remembers on the device, by slot.

R is the number of slots (max_running_requests). Row R of each array belongs to rows of padding: it
is written freely.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampler.fields import FLOATS, INTS


class Sampled(NamedTuple):
    """What sampling carries from token to token, donated."""

    last_tokens: jax.Array
    """[R+1] int32."""
    counts: jax.Array
    """[R+1, V] int32: how often each token was generated."""

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> Sampled:
        """Of `rows` = R + 1 slots."""
        return cls(jnp.zeros(rows, jnp.int32), jnp.zeros((rows, vocab_size), jnp.int32))


class RowParams(NamedTuple):
    """The fields of `sampler.fields`, by slot, written when a request is admitted. A step picks the
    columns of its rows."""

    floats: jax.Array
    """[R+1, len(FLOATS)] float32."""
    ints: jax.Array
    """[R+1, len(INTS)] int32 (seed: the bits of a uint32)."""

    @classmethod
    def neutral(cls, rows: int) -> RowParams:
        """Of `rows` = R + 1 slots without a request."""
        return cls(*(jnp.asarray(np.tile(part.neutral, (rows, 1))) for part in (FLOATS, INTS)))

    def columns(self, rows: jax.Array) -> dict[str, jax.Array]:
        """Each field of slots `rows` [B], by its name: [B]."""
        floats = zip(FLOATS.names, self.floats[rows].T, strict=True)
        return dict([*floats, *zip(INTS.names, self.ints[rows].T, strict=True)])

    def column(self, name: str, rows: jax.Array) -> jax.Array:
        """One field of int32, of slots `rows` of any shape."""
        return self.ints[rows, INTS.names.index(name)]


class SparseRows(NamedTuple):
    """Sparse per-slot lists, written only for requests that have any; the fields num_bias and
    num_named say how many entries of a slot's are live."""

    bias_ids: jax.Array
    """[R+1, C] int32."""
    bias_values: jax.Array
    """[R+1, C] float32, added to the logits."""
    bias_until: jax.Array
    """[R+1, C] int32: the first position at which the bias does not count any more."""
    logprob_ids: jax.Array
    """[R+1, I] int32: named tokens whose logprobs are reported."""

    @classmethod
    def empty(cls, rows: int, bias: int, named: int) -> SparseRows:
        """Of `rows` = R + 1 slots, with room for `bias` and `named` entries."""
        ints = jnp.zeros((rows, bias), jnp.int32)
        values = jnp.zeros((rows, bias), jnp.float32)
        return cls(ints, values, jnp.zeros_like(ints), jnp.zeros((rows, named), jnp.int32))
