"""What attention needs to know about a step, as arguments of the traced step."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtendMeta:
    """Packed ragged tokens of B sequences, each after a cached prefix.

    slots [T]: flat cache position (page * S + offset) each token's K and V go to; out of range for
    padding. page_table [B, W]. q_starts, q_lens, prefix_lens [B]: see paged_prefill. All int32.
    """

    slots: jax.Array
    page_table: jax.Array
    q_starts: jax.Array
    q_lens: jax.Array
    prefix_lens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeMeta:
    """One token for each of B rows.

    slots [B] as above. page_table [B, W]. lengths [B]: tokens to attend to, the current one
    included; 0 for rows of padding. All int32.
    """

    slots: jax.Array
    page_table: jax.Array
    lengths: jax.Array
