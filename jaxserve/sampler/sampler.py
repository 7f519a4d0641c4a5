"""Logits to tokens, every parameter per row. Neutral values make any mix of rows one program."""

from __future__ import annotations

import dataclasses
import importlib

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
    ) -> tuple[Sampled, jax.Array, jax.Array]:
        """Draw a token for each row and carry it to the next step.

        logits [B, V] float32; rows [B] int32 slots (R for padding); positions [B] int32 of the
        tokens drawn now. Returns the updated carry, tokens [B] int32 and their packed logprobs.
        """
        columns = params.columns(rows)
        for name, transform in TRANSFORMS:
            logits = transform(logits, columns[name])
        wanted = {name: columns[name] for name in KERNEL_FIELDS}
        live = rows < params.ints.shape[0] - 1
        found = pallas_kernels.sample(
            logits,
            pallas_kernels.SampleRows(
                slot=rows,
                live=live.astype(jnp.int32),
                position=positions,
                **wanted,
            ),
            pallas_kernels.SlotLists(sampled.counts, *sparse),
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
