"""A model's products alone. Compiled while the device is at rest, they make XLA choose kernels.

XLA chooses among its kernels for a product by timing them on the device, and keeps the choice for
as long as the process lives. Programs that are compiled while requests run find it there, and time
nothing. Two layers are enough: the first one's input is the embeddings, the last one's output goes
to the final norm, and what lies between has a neighbour of its own kind on either side (checked on
an H100 with jax 0.11.2: behind these, XLA finds every choice for the whole programs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxserve.attention.paged import PagedOps
from jaxserve.models.ops import AttentionSpec
from jaxserve.step.step import INPUT_LOGPROB_ROWS, StepModel

LAYERS = 2
Seen = tuple[jax.Array, ...]
"""qkv [T, (N + 2K) * H] of each layer so far."""


@dataclasses.dataclass(frozen=True)
class GivenAttention(PagedOps):
    """The engine's products, with attention that was computed elsewhere: what stands next to it in
    a step is a kernel of ours, and here the beginning and the end of the program."""

    attended: tuple[jax.Array, ...] = ()
    """[T, N * H] of each layer."""

    @classmethod
    def beside(cls, ops: PagedOps, attended: tuple[jax.Array, ...]) -> GivenAttention:
        """With the choices of `ops`."""
        fields = {field.name: getattr(ops, field.name) for field in dataclasses.fields(PagedOps)}
        return cls(**fields, attended=attended)

    def attend(  # pyright: ignore[reportIncompatibleMethodOverride] (the cache is opaque to models)
        self, qkv: jax.Array, cos: jax.Array, sin: jax.Array, cache: Seen, meta: None,
        spec: AttentionSpec, **norms: Any,
    ) -> tuple[jax.Array, Seen]:  # fmt: skip
        return self.attended[spec.layer], (*cache, qkv)


def products(
    model: StepModel, params: tuple[jax.Array, ...], attended: tuple[jax.Array, ...],
    tokens: jax.Array, at: jax.Array,
) -> tuple[tuple[()], Any]:  # fmt: skip
    """Everything that a step of T tokens multiplies with weights; nothing is donated.

    attended: [T, N * H] of each layer of `model`. tokens [T] int32. at [B] int32: rows of which
    there are logits. Their values do not matter: nobody runs this program.
    """
    module = model.bind(params)
    ops = GivenAttention.beside(model.ops, attended)
    hidden, seen = module(tokens, tokens, (), None, ops)
    of_prompts = module.logits(hidden[: min(INPUT_LOGPROB_ROWS, len(tokens))])
    return (), (seen, hidden, module.logits(hidden[at]), of_prompts)
