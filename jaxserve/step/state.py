"""Everything the device remembers between steps, beside the parameters and the KV pages.

R is the number of slots (max_running_requests). Row R of each array belongs to rows of padding:
it is written freely and its length stays 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import ProgramConfig

FLOATS = ("temperature", "top_p", "min_p", "frequency", "presence", "repetition")
INTS = (
    "top_k", "seed", "sample_index", "prompt_len", "num_bias", "wants_logprob", "num_top",
    "num_named",
)  # fmt: skip
NO_TOP_K = 1 << 30


class Progress(NamedTuple):
    """Changes every step, donated.

    lengths [R+1]: tokens whose KV is cached. page_table [R+1, W]. Both int32.
    """

    lengths: jax.Array
    page_table: jax.Array


class Sampled(NamedTuple):
    """What sampling carries from token to token, donated: last_tokens [R+1], counts [R+1, V] of
    generated tokens. Both int32."""

    last_tokens: jax.Array
    counts: jax.Array


class RowParams(NamedTuple):
    """Sampling parameters by slot, written when a request is admitted.

    floats [R+1, len(FLOATS)] float32; ints [R+1, len(INTS)] int32 (seed: the bits of a uint32).
    """

    floats: jax.Array
    ints: jax.Array

    def float_columns(self, rows: jax.Array) -> dict[str, jax.Array]:
        return dict(zip(FLOATS, self.floats[rows].T, strict=True))

    def int_columns(self, rows: jax.Array) -> dict[str, jax.Array]:
        return dict(zip(INTS, self.ints[rows].T, strict=True))


class SparseRows(NamedTuple):
    """Sparse per-slot lists: biases (ids, values, until) [R+1, C] and named logprob ids [R+1, I].

    Written only for requests that have any; RowParams.num_bias says whether a slot's are live.
    """

    bias_ids: jax.Array
    bias_values: jax.Array
    bias_until: jax.Array
    logprob_ids: jax.Array


class DeviceState(NamedTuple):
    progress: Progress
    sampled: Sampled
    row_params: RowParams
    sparse: SparseRows


def initial_state(config: ProgramConfig, vocab_size: int) -> DeviceState:
    """All slots empty."""
    rows = config.max_rows + 1
    bias = (rows, config.bias_capacity)
    floats = np.tile(np.array([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], np.float32), (rows, 1))
    ints = np.tile(np.array([1] + [0] * (len(INTS) - 1), np.int32), (rows, 1))
    return DeviceState(
        Progress(jnp.zeros(rows, jnp.int32), jnp.zeros((rows, config.table_width), jnp.int32)),
        Sampled(jnp.zeros(rows, jnp.int32), jnp.zeros((rows, vocab_size), jnp.int32)),
        RowParams(jnp.asarray(floats), jnp.asarray(ints)),
        SparseRows(
            jnp.zeros(bias, jnp.int32),
            jnp.zeros(bias, jnp.float32),
            jnp.zeros(bias, jnp.int32),
            jnp.zeros((rows, config.max_logprob_ids), jnp.int32),
        ),
    )
