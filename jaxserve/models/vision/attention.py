"""Attention of patches, which a tower leaves to its caller: not causal, and no further than a
patch's own picture, window or tile. The engine passes `pallas_kernels.range_attention`.

Letters: P patches, N heads, H head dim; B tiles of S patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""What a layer is given: q, k, v [..., N, H] -> what each patch collects, [..., N, H]."""


class RangeAttention(Protocol):
    """What a tower is given. Called without ranges it is the `Attend` of tiles."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        starts: jax.Array | None = None,
        ends: jax.Array | None = None,
        *,
        most: int | None = None,
    ) -> jax.Array:
        """q, k, v [B, S, N, H] -> [B, S, N, H]: softmax of scores divided by sqrt(H), in float32.

        A patch sees those from its start up to, not including, its end, both [B, S] int32, or all
        of its S without. Patches with one range lie together, and no range has more than `most`
        where that is said. Scores of all patches with all are never in memory at once, unless they
        are few, and a patch that sees nothing is not NaN.
        """
        ...


def within(
    attention: RangeAttention, starts: jax.Array, ends: jax.Array, most: int | None = None
) -> Attend:
    """Of patches side by side, q, k, v [P, N, H]: each within its range. starts, ends [P]."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q[None], k[None], v[None], starts[None], ends[None], most=most)[0]

    return attend
