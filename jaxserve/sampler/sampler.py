"""Logits to tokens, every parameter per row. Neutral values make any mix of rows one program."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxserve.sampler.fields import FIELDS
from jaxserve.sampler.logprobs import TokenLogprobs
from jaxserve.sampler.state import RowParams, Sampled, SparseRows

KERNEL_FIELDS = {field.name for field in FIELDS} & {*pallas_kernels.SampleRows._fields}
"""What the sampling kernel wants to know of a row."""
TRANSFORMS = tuple(
    (field.name, importlib.import_module(field.transform).transform)
    for field in FIELDS
    if field.transform
)
"""What changes logits before penalties, biases and filters, by the field that it depends on."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a step draws its tokens; fixed when the engine starts."""

    top: int
    """C: columns of the best logprobs."""
    raw_logprobs: bool
    """Logprobs are those before temperature instead of after (SGLang's
    SGLANG_RETURN_ORIGINAL_LOGPROB)."""
    implementation: str | None
    """Of the kernel; None is the device's default."""
    fixed_split: bool = False
    """See `pallas_kernels.sample`."""

    def __call__(
        self,
        logits: jax.Array,
        sampled: Sampled,
        rows: jax.Array,
        positions: jax.Array,
        params: RowParams,
        sparse: SparseRows,
        change: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[Sampled, jax.Array, jax.Array]:
        """Draw a token for each row and carry it to the next step.

        logits [B, V] float32; rows [B] int32 slots (R for padding); positions [B] int32 of the
        tokens drawn now. change: of the logits, after penalties and biases. Returns the updated
        carry, tokens [B] int32 and their packed logprobs.
        """
        logits, wants, lists = self.begin(logits, sampled, rows, positions, params, sparse)
        if change is not None:
            logits = change(pallas_kernels.adjust(logits, wants, lists))
            wants = wants._replace(**_adjusted(wants))
        found = pallas_kernels.sample(
            logits,
            wants,
            lists,
            top=self.top,
            raw_logprobs=self.raw_logprobs,
            fixed_split=self.fixed_split,
            implementation=self.implementation,
        )
        tokens = found.tokens
        carry = Sampled(
            sampled.last_tokens.at[rows].set(tokens), sampled.counts.at[rows, tokens].add(1)
        )
        return carry, tokens, TokenLogprobs(*found[1:]).pack()

    @staticmethod
    def begin(
        logits: jax.Array,
        sampled: Sampled,
        rows: jax.Array,
        positions: jax.Array,
        params: RowParams,
        sparse: SparseRows,
    ) -> tuple[jax.Array, pallas_kernels.SampleRows, pallas_kernels.SlotLists]:
        """What the kernel is given, arguments as of a call."""
        columns = params.columns(rows)
        for name, transform in TRANSFORMS:
            logits = transform(logits, columns[name])
        wanted = {name: columns[name] for name in KERNEL_FIELDS}
        live = rows < params.ints.shape[0] - 1
        wants = pallas_kernels.SampleRows(
            slot=rows, live=live.astype(jnp.int32), position=positions, **wanted
        )
        return logits, wants, pallas_kernels.SlotLists(sampled.counts, *sparse)


def _adjusted(rows: pallas_kernels.SampleRows) -> dict[str, jax.Array]:
    """The fields of rows whose penalties and biases have been applied."""
    neutral = {"frequency": 0.0, "presence": 0.0, "repetition": 1.0, "num_bias": 0}
    return {name: jnp.full_like(getattr(rows, name), value) for name, value in neutral.items()}
