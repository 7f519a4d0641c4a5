"""The programs of a laboratory, beside the engine's extend steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.attention.paged import Cache
from jaxserve.sampler.state import RowParams
from jaxserve.step.catalogue import Program
from jaxserve.step.chain_programs import ChainBuckets
from jaxserve.step.decode import DecodeRows, forward
from jaxserve.step.pages import copy_pages
from jaxserve.step.payloads import USUAL
from jaxserve.step.programs import Facts
from jaxserve.step.step import StepModel

STEP, BRANCH, HEAD = "lab_step", "lab_branch", "lab_head"
"""Kinds."""


def lab_programs(facts: Facts) -> list[Program]:
    """One token for each of B handles or branches, and logits of N places of an extend step."""
    state, buckets, program = facts.state(), facts.config.buckets, facts.config.program
    hidden, dtype = facts.model.hidden_size, facts.dtype
    model = functools.partial(facts.step_model, USUAL)

    def step(kind: str, function: Any, given: dict[str, Any], padding: dict[str, int]) -> Program:
        """padding: what a row of it is given, where that is not 0."""
        given = {"tokens": facts.array, "tables": tables, **given}

        def nobody(rows: int) -> dict[str, Any]:
            found = {}
            for name, argument in given.items():
                spec: Any = argument(rows) if callable(argument) else argument
                found[name] = np.full(spec.shape, padding.get(name, 0), spec.dtype)
            return found

        kept = {name: state[name] for name in ("params", "cache", "row_params")}
        return Program(
            kind,
            lambda rows: functools.partial(function, model()),
            {**kept, **given, "comm": facts.comm},
            donated=("cache",),
            buckets=ChainBuckets.of(buckets).decode[::-1],
            choices=lambda rows: facts.choices(rows, rows),
            mosaic=facts.decodes_with_mosaic,
            nobody=nobody,
        )

    def tables(rows: int) -> jax.ShapeDtypeStruct:
        return facts.array(rows, program.table_width)

    parents = {"parents": facts.array, "tails": facts.array, "length": facts.array()}
    return [
        step(STEP, step_handles, {"lengths": facts.array}, {"lengths": -1}),
        step(
            BRANCH, functools.partial(step_branches, facts.model.num_layers), parents, {"tails": -1}
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
    tables: jax.Array,
    lengths: jax.Array,
    comm: jax.Array | None = None,
) -> tuple[tuple[Cache], tuple[jax.Array, jax.Array]]:
    """A decode step of rows that have no slots.

    tokens [B] int32: what runs. tables [B, W] int32: pages. lengths [B] int32: how many tokens are
    before (-1: padding). Returns (the cache as updated), hidden [B, D] and logits [B, V] float32.
    """
    slots = jnp.full_like(lengths, row_params.ints.shape[0] - 1)  # that of padding: neutral
    first = jnp.maximum(lengths, 0)
    rows = DecodeRows(slots, lengths >= 0, first, tables, tables)
    module, ops = model.bind(params), model.ops.joined(comm)
    seen, cache = forward(model, module, ops, rows, tokens, first, cache, row_params)
    return (cache,), (seen.hidden, seen.logits)


def step_branches(
    num_layers: int,
    model: StepModel,
    params: tuple[jax.Array, ...],
    cache: Cache,
    row_params: RowParams,
    tokens: jax.Array,
    tables: jax.Array,
    parents: jax.Array,
    tails: jax.Array,
    length: jax.Array,
    comm: jax.Array | None = None,
) -> tuple[tuple[Cache], tuple[jax.Array, jax.Array, jax.Array]]:
    """`step_handles` of rows that go on from others: row i from `tables` [parents[i]], of `length`
    tokens as all of them.

    parents [B] int32. tails [B] int32: the page of each row's own that it writes into, beginning
    with a copy of its parent's (-1: padding). Returns (the cache as updated), hidden, logits, and
    the rows' tables.
    """
    size, live = model.page_size, tails >= 0
    place, num_pages = length // size, cache.k.shape[0] // num_layers
    tables = tables[parents]
    targets = jnp.where(live & (length % size > 0), tails, num_pages)
    (cache,), _ = copy_pages(num_layers, cache, tables[:, place], targets)
    tables = tables.at[:, place].set(jnp.where(live, tails, 0))
    lengths = jnp.where(live, length, -1)
    updated, output = step_handles(model, params, cache, row_params, tokens, tables, lengths, comm)
    return updated, (*output, tables)


def read_places(
    model: StepModel, params: tuple[jax.Array, ...], hidden: jax.Array, places: jax.Array
) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
    """Of hidden [T, D]: that of places [N] int32, and their logits [N, V] float32."""
    found = hidden[places]
    return (), (found, model.bind(params).logits(found))
