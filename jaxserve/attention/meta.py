"""What attention needs to know about a step, as arguments of the traced step."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtendMeta:
    """Packed ragged tokens of B sequences, each after a cached prefix. All int32; see
    `paged_prefill`."""

    slots: jax.Array
    """[T]: flat cache position (page * S + offset) each token's K and V go to; out of range for
    padding."""
    page_table: jax.Array
    """[B, W]."""
    q_starts: jax.Array
    """[B]: each sequence's first packed token."""
    q_lens: jax.Array
    """[B]: how many it has."""
    prefix_lens: jax.Array
    """[B]: tokens cached before them."""
    reach: jax.Array | None = None
    """[T]: the last position that each token sees, where tokens see all of their block, such as a
    picture's (Gemma 3); None in models without, whose programs know nothing of it. See
    `paged_prefill`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeMeta:
    """One token for each of B rows. All int32; see `paged_decode`."""

    slots: jax.Array
    """[B], as above."""
    page_table: jax.Array
    """[B, W]."""
    lengths: jax.Array
    """[B]: tokens to attend to, the current one included; 0 for rows of padding."""
