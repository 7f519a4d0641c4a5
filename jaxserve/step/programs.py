"""The programs of an engine. One more is one more entry of `engine_programs`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import PagedOps
from jaxserve.batch.pack import ExtendLayout
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.sampler.sampler import Sampler
from jaxserve.step import pages, step
from jaxserve.step.catalogue import Catalogue, Program
from jaxserve.step.memory import Memory
from jaxserve.step.wide import WIDE

FEW_HEADS, CLUSTER_HEAD_DIM = 66, 128
"""Decode steps with at most so many rows x KV heads, of that head dim, have a Mosaic kernel on
Hopper (paged_decode.mosaic_cluster). Being wrong about it only costs time at the first start."""


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What the programs of an engine are made of."""

    model: ModelConfig
    memory: Memory
    dtype: jnp.dtype
    """Of activations."""
    params: tuple[jax.ShapeDtypeStruct, ...]
    """Abstract parameters, in the order in which `bind` takes them."""
    bind: Callable[[tuple[jax.Array, ...]], Any]
    """Flat parameters -> module."""

    @property
    def config(self) -> EngineConfig:
        return self.memory.config

    def step_model(self, top: int) -> step.StepModel:
        """The model over a cache of the present size; top: columns of the best logprobs."""
        config = self.config
        ops = PagedOps(
            config.attention, config.other_kernels, self.memory.num_pages, config.platform,
            fixed_tiles=config.deterministic,
        )  # fmt: skip
        sampler = Sampler(
            top, config.raw_logprobs, config.other_kernels, fixed_split=config.deterministic
        )
        return step.StepModel(self.bind, ops, sampler, config.page_size)

    def layout(self, tokens: int) -> ExtendLayout:
        """Of the extend program of `tokens` tokens."""
        return ExtendLayout(
            tokens, self.config.buckets.extend_rows(tokens), self.config.table_width
        )

    @property
    def decode_kinds(self) -> tuple[str, ...]:
        """Of the programs with one decode step and, where there are any, with several."""
        return ("decode",) if self.config.steps_per_dispatch == 1 else ("decode", "decode_many")

    def state(self, wide: bool = False) -> dict[str, Any]:
        """The abstract arguments of a step that an engine keeps, by name."""
        state = self.memory.state_spec._asdict()
        _, named = self.config.logprob_columns(wide)
        state["sparse"] = state["sparse"]._replace(
            logprob_ids=_ints(self.config.max_rows + 1, named)
        )
        return {"params": self.params, "cache": self.memory.cache_spec, **state}


def engine_programs(facts: Facts) -> Catalogue:
    """Every program that a batch can need."""
    wide = [dataclasses.replace(entry, buckets=()) for entry in step_programs(facts, wide=True)]
    return Catalogue([*step_programs(facts), *page_programs(facts), *wide])


def step_programs(facts: Facts, wide: bool = False) -> list[Program]:
    """Extend and decode steps, and the logprobs of prompts. wide: with the columns for requests
    that want more logprobs, see `config.WIDE_TOP`."""
    config, ending = facts.config, WIDE if wide else ""
    buckets, state = config.buckets, facts.state(wide)
    top, _ = config.logprob_columns(wide)
    few = FEW_HEADS // facts.model.num_kv_heads if facts.model.head_dim == CLUSTER_HEAD_DIM else 0

    def vector(tokens: int) -> jax.ShapeDtypeStruct:
        return _ints(facts.layout(tokens).size)

    def extend(tokens: int) -> Callable[..., Any]:
        return functools.partial(step.extend_step, facts.step_model(top), facts.layout(tokens))

    def input_logprobs(tokens: int) -> Callable[..., Any]:
        model = facts.step_model(top)
        return functools.partial(step.input_logprobs, model, facts.layout(tokens), top=top)

    def decode(steps: int) -> Callable[[int], Callable[..., Any]]:
        return lambda rows: functools.partial(step.decode_steps, facts.step_model(top), steps)

    entries = [
        Program(
            "extend" + ending,
            extend,
            {**state, "packed": vector},
            donated=("cache", "progress", "sampled", "row_params"),
            buckets=buckets.extend[::-1],
            mosaic=lambda tokens: True,
        )
    ]
    entries += [
        Program(
            kind + ending,
            decode(steps),
            {**state, "rows": lambda rows: _ints(2, rows)},
            donated=("cache", "progress", "sampled"),
            buckets=buckets.decode[::-1],
            mosaic=lambda rows: rows <= few,
        )
        for kind, steps in zip(facts.decode_kinds, (1, config.steps_per_dispatch), strict=False)
    ]
    hidden = facts.model.hidden_size
    entries.append(
        Program(
            "input_logprobs" + ending,
            input_logprobs,
            {
                **{name: state[name] for name in ("params", "row_params", "sparse")},
                "packed": vector,
                "hidden": lambda tokens: jax.ShapeDtypeStruct((tokens, hidden), facts.dtype),
            },
            buckets=buckets.extend[::-1],
        )
    )
    return entries


def page_programs(facts: Facts) -> list[Program]:
    """Copies of pages, within the pool and to the host and back, and of a slot's sparse lists."""
    memory, layers = facts.memory, facts.model.num_layers
    cache, sparse = memory.cache_spec, memory.state_spec.sparse

    def of_layers(function: Callable[..., Any]) -> Callable[[int], Callable[..., Any]]:
        return lambda bucket: functools.partial(function, layers)

    row = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in sparse._asdict().items()}
    entries = [
        Program(
            "copy_pages",
            of_layers(pages.copy_pages),
            {"cache": cache, "sources": _ints, "targets": _ints},
            donated=("cache",),
            buckets=(pages.COPY_WIDTH,),
        ),
        Program(
            "install_sparse",
            lambda bucket: pages.install_sparse,
            {"sparse": sparse, "slot": _ints(), **row},
            donated=("sparse",),
            buckets=(0,),
        ),
    ]
    if facts.config.host is None:
        return entries
    block = (memory.block_pages,)
    content = jax.ShapeDtypeStruct(memory.block_shape, memory.cache_dtype)
    return [
        *entries,
        Program(
            "gather_pages",
            of_layers(pages.gather_pages),
            {"cache": cache, "pages": _ints},
            buckets=block,
        ),
        Program(
            "scatter_pages",
            of_layers(pages.scatter_pages),
            {"cache": cache, "pages": _ints, "content": content},
            donated=("cache",),
            buckets=block,
        ),
    ]


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
