"""The programs of an engine. One more is one more entry of `engine_programs`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import PagedOps
from jaxserve.batch.layout import ExtendLayout
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.sampler.sampler import Sampler
from jaxserve.step import pages, prompt, step
from jaxserve.step.catalogue import Catalogue, Program
from jaxserve.step.memory import Memory
from jaxserve.step.payloads import PAYLOADS, PromptRows, Variant
from pallas_kernels import decode_implementation


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
    device: Any

    @property
    def config(self) -> EngineConfig:
        return self.memory.config

    def step_model(self, variant: Variant) -> step.StepModel:
        """The model over a cache of the present size, in programs that report `variant`."""
        program = self.config.program
        ops = PagedOps(
            program.attention, program.other_kernels, self.memory.num_pages, program.crossovers,
            fixed_tiles=program.deterministic,
        )  # fmt: skip
        top, _ = program.logprob_columns(variant.wide)
        sampler = Sampler(
            top, program.raw_logprobs, program.other_kernels, fixed_split=program.deterministic
        )
        return step.StepModel(self.bind, ops, sampler, program.page_size, variant.payloads)

    def decodes_with_mosaic(self, rows: int) -> bool:
        """Whether a decode step of `rows` rows has a Mosaic kernel. (Being wrong about it only
        costs time at the first start.)"""
        model, program = self.model, self.config.program
        q = jax.ShapeDtypeStruct((rows, model.num_heads, model.head_dim), self.dtype)
        table = _ints(rows, program.table_width)
        with jax.default_device(self.device):
            name = decode_implementation(q, self.memory.cache_spec.k, table, program.attention)
        return name.startswith("mosaic")

    def layout(self, tokens: int) -> ExtendLayout:
        """Of the extend program of `tokens` tokens."""
        return ExtendLayout(
            tokens, self.config.buckets.extend_rows(tokens), self.config.program.table_width
        )

    def packed(self, tokens: int) -> jax.ShapeDtypeStruct:
        """The vector of the extend program of `tokens` tokens."""
        return _ints(self.layout(tokens).size)

    @property
    def decode_kinds(self) -> tuple[str, ...]:
        """Of the programs with one decode step and, where there are any, with several."""
        several = self.config.program.steps_per_dispatch > 1
        return ("decode", "decode_many") if several else ("decode",)

    def state(self, wide: bool = False) -> dict[str, Any]:
        """The abstract arguments of a step that an engine keeps, by name."""
        state = self.memory.state_spec._asdict()
        _, named = self.config.program.logprob_columns(wide)
        state["sparse"] = state["sparse"]._replace(
            logprob_ids=_ints(self.config.program.max_rows + 1, named)
        )
        return {"params": self.params, "cache": self.memory.cache_spec, **state}


def engine_programs(facts: Facts) -> Catalogue:
    """Every program that a batch can need. Those of requests that want what is not usual are
    compiled when they are first wanted."""
    usual, *rare = Variant.all()
    later = [each for variant in rare for each in step_programs(facts, variant)]
    later += prompt_programs(facts, wide=True)
    return Catalogue(
        [
            *step_programs(facts, usual),
            *prompt_programs(facts, wide=False),
            *page_programs(facts),
            *(dataclasses.replace(each, buckets=()) for each in later),
        ]
    )


def step_programs(facts: Facts, variant: Variant) -> list[Program]:
    """Extend and decode steps that report `variant`."""
    program, ending = facts.config.program, variant.ending
    buckets, state = facts.config.buckets, facts.state(variant.wide)

    def extend(tokens: int) -> Callable[..., Any]:
        return functools.partial(step.extend_step, facts.step_model(variant), facts.layout(tokens))

    def decode(steps: int) -> Callable[[int], Callable[..., Any]]:
        return lambda rows: functools.partial(step.decode_steps, facts.step_model(variant), steps)

    entries = [
        Program(
            "extend" + ending,
            extend,
            {**state, "packed": facts.packed},
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
            mosaic=facts.decodes_with_mosaic,
        )
        for kind, steps in zip(facts.decode_kinds, (1, program.steps_per_dispatch), strict=False)
    ]
    return entries


def prompt_programs(facts: Facts, wide: bool) -> list[Program]:
    """What extend steps are asked about their prompts, a program for each payload."""
    variant = Variant(wide=wide)
    state, hidden = facts.state(wide), facts.model.hidden_size

    def make(payload: Callable[[PromptRows], jax.Array]) -> Callable[[int], Callable[..., Any]]:
        return lambda tokens: functools.partial(
            prompt.prompt_payload, facts.step_model(variant), facts.layout(tokens), payload
        )

    return [
        Program(
            f"prompt_{each.name}{variant.ending}",
            make(each.prompt),
            {
                **{name: state[name] for name in ("params", "row_params", "sparse")},
                "packed": facts.packed,
                "hidden": lambda tokens: jax.ShapeDtypeStruct((tokens, hidden), facts.dtype),
            },
            buckets=facts.config.buckets.extend[::-1] if each.usual else (),
        )
        for each in PAYLOADS
        if each.prompt is not None
    ]


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
