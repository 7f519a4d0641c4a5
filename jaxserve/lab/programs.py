"""The programs of a laboratory, beside the engine's extend steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import Cache
from jaxserve.packing.buckets import Buckets
from jaxserve.sampler.state import RowParams
from jaxserve.step.catalogue import Program
from jaxserve.step.chain_programs import ChainBuckets
from jaxserve.step.decode import DecodeRows, forward
from jaxserve.step.payloads import USUAL
from jaxserve.step.programs import Facts
from jaxserve.step.step import StepModel

STEP, HEAD = "lab_step", "lab_head"
"""Kinds."""


def step_rows(buckets: Buckets) -> tuple[int, ...]:
    """Handles that a step takes, ascending: sizes of its programs."""
    return ChainBuckets.of(buckets).decode


def lab_programs(facts: Facts) -> list[Program]:
    """One token for each of B handles, and the logits of N places of an extend step."""
    state, buckets, program = facts.state(), facts.config.buckets, facts.config.program
    hidden, dtype = facts.model.hidden_size, facts.dtype
    model = functools.partial(facts.step_model, USUAL)

    def nobody(rows: int) -> dict[str, Any]:
        given = facts.array(rows, program.table_width)
        return {
            "tokens": jnp.zeros(rows, jnp.int32),
            "lengths": jnp.full(rows, -1, jnp.int32),
            "tables": jnp.zeros(given.shape, given.dtype),
        }

    return [
        Program(
            STEP,
            lambda rows: functools.partial(step_handles, model()),
            {
                **{name: state[name] for name in ("params", "cache", "row_params")},
                "tokens": facts.array,
                "lengths": facts.array,
                "tables": lambda rows: facts.array(rows, program.table_width),
                "comm": facts.comm,
            },
            donated=("cache",),
            buckets=step_rows(buckets)[::-1],
            choices=lambda rows: facts.choices(rows, rows),
            mosaic=facts.decodes_with_mosaic,
            nobody=nobody,
        ),
        Program(
            HEAD,
            lambda tokens: functools.partial(read_places, model()),
            {
                "params": state["params"],
                "hidden": lambda tokens: facts.array(tokens, hidden, dtype=dtype),
                "places": lambda tokens: facts.array(buckets.extend_rows(tokens)),
            },
            buckets=buckets.extend[::-1],
            choices=lambda tokens: facts.choices(0, buckets.extend_rows(tokens)),
        ),
    ]


def step_handles(
    model: StepModel,
    params: tuple[jax.Array, ...],
    cache: Cache,
    row_params: RowParams,
    tokens: jax.Array,
    lengths: jax.Array,
    tables: jax.Array,
    comm: jax.Array | None = None,
) -> tuple[tuple[Cache], tuple[jax.Array, jax.Array]]:
    """A decode step of rows that have no slots.

    tokens, lengths [B] int32: what runs, and how many tokens are before it (-1: padding). tables
    [B, W] int32: pages. Returns (the cache as updated), hidden [B, D] and logits [B, V] float32.
    """
    slots = jnp.full_like(lengths, row_params.ints.shape[0] - 1)  # that of padding: neutral
    first = jnp.maximum(lengths, 0)
    rows = DecodeRows(slots, lengths >= 0, first, tables, tables)
    module, ops = model.bind(params), model.ops.joined(comm)
    seen, cache = forward(model, module, ops, rows, tokens, first, cache, row_params)
    return (cache,), (seen.hidden, seen.logits)


def read_places(
    model: StepModel, params: tuple[jax.Array, ...], hidden: jax.Array, places: jax.Array
) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
    """Of hidden [T, D]: that of places [N] int32, and their logits [N, V] float32."""
    found = hidden[places]
    return (), (found, model.bind(params).logits(found))
