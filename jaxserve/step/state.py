"""Everything the device remembers between steps, beside the parameters and the KV pages.

R is the number of slots (max_running_requests). Row R of each array belongs to rows of padding:
it is written freely and its length stays 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.config import ProgramConfig
from jaxserve.sampler.state import RowParams, Sampled, SparseRows


class Progress(NamedTuple):
    """Changes every step, donated."""

    lengths: jax.Array
    """[R+1] int32: tokens whose KV is cached."""
    page_table: jax.Array
    """[R+1, W] int32."""


class DeviceState(NamedTuple):
    progress: Progress
    sampled: Sampled
    row_params: RowParams
    sparse: SparseRows


def initial_state(config: ProgramConfig, vocab_size: int) -> DeviceState:
    """All slots empty."""
    rows = config.max_rows + 1
    table = jnp.zeros((rows, config.table_width), jnp.int32)
    return DeviceState(
        Progress(jnp.zeros(rows, jnp.int32), table),
        Sampled.empty(rows, vocab_size),
        RowParams.neutral(rows),
        SparseRows.empty(rows, config.bias_capacity, config.max_logprob_ids),
    )
