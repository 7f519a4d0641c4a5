"""A model's products alone. Compiled while the device is at rest, they make XLA choose kernels.

XLA chooses among its kernels for a product of few rows by timing them on the device, and keeps the
choice: in the process, and in files that later ones read (`StoredPrograms.choices`). A program that
is compiled while requests run must not time anything; it finds these choices, and for all else
takes what is likely to be fast.

The programs here have the products of a step and nothing between them: two layers, because the
first one's input is the embeddings, the last one's output goes to the final norm, and what lies
between has a neighbour of its own kind on either side; and, apart, because XLA would merge two
products with the same weights, the LM head. (H100, jax 0.11.2: behind the layers' products XLA
lacked no choice for the layers of whole programs. Without them a step of 8 rows of the 8B shape
took 13.1 ms instead of 5.8, of 96 rows 103 instead of 8.0.)
"""

from __future__ import annotations

from typing import Any

import jax

from jaxserve.attention.paged import PagedOps
from jaxserve.models.ops import AttentionSpec
from jaxserve.step.step import StepModel

LAYERS = 2
Seen = tuple[jax.Array, ...]
"""qkv [T, (N + 2K) * H] of each layer so far."""


class GivenAttention:
    """The engine's products, with attention that was computed elsewhere: what stands next to it in
    a step is a kernel of ours, and here the beginning and the end of the program."""

    def __init__(self, ops: PagedOps, attended: tuple[jax.Array, ...]) -> None:
        """attended: [T, N * H] of each layer."""
        self.linear_in, self.linear_out = ops.linear_in, ops.linear_out
        self.total, self.norm = ops.total, ops.norm
        self._attended = attended

    def attend(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: Seen,
        meta: None,
        spec: AttentionSpec,
        **norms: Any,
    ) -> tuple[jax.Array, Seen]:
        """See `Ops.attend`."""
        return self._attended[spec.layer], (*cache, qkv)


def layer_products(
    model: StepModel,
    params: tuple[jax.Array, ...],
    attended: tuple[jax.Array, ...],
    tokens: jax.Array,
) -> tuple[tuple[()], Any]:
    """What the layers of a step of T tokens multiply with weights; nothing is donated.

    attended: [T, N * H] of each layer of `model`. tokens [T] int32. Their values do not matter:
    nobody runs this program.
    """
    ops = GivenAttention(model.ops, attended)
    hidden, seen = model.bind(params)(tokens, tokens, (), None, ops)
    return (), (seen, hidden)


def head_product(
    model: StepModel, params: tuple[jax.Array, ...], hidden: jax.Array
) -> tuple[tuple[()], jax.Array]:
    """The LM head's, of hidden [B, D]; as `layer_products`."""
    return (), model.bind(params).logits(hidden)
