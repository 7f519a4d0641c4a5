"""The programs of an engine. One more is one more entry of `engine_programs`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.attention.cut import CutOps
from jaxserve.attention.paged import PagedOps
from jaxserve.cache.host_pool import BLOCK
from jaxserve.config import EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Declaration, declare
from jaxserve.packing.layout import TOKEN_FIELDS, ExtendLayout
from jaxserve.packing.media import MEDIA, POSITIONS, REACH
from jaxserve.parallel.mesh import TENSOR, first_device, replicated
from jaxserve.sampler.sampler import Sampler
from jaxserve.step import pages, products, prompt, state_programs, step
from jaxserve.step.catalogue import Catalogue, Program, ProgramKey
from jaxserve.step.decode import decode_steps
from jaxserve.step.hook import Hook
from jaxserve.step.memory import Memory
from jaxserve.step.nobody import no_rows, no_tokens
from jaxserve.step.payloads import PAYLOADS, USUAL, PromptRows, Variant
from jaxserve.step.picture_programs import TowerFacts, picture_programs
from jaxserve.step.xla_options import chooses_by_timing
from jaxserve.weights import Kept, kept
from pallas_kernels import decode_implementation

LAYER_PRODUCTS, HEAD_PRODUCT = "layer_products", "head_product"
"""Kinds of the programs that choose kernels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What the programs of an engine are made of."""

    declaration: Declaration
    memory: Memory
    kept: Kept
    """The parameters as programs take them."""
    mesh: Mesh
    comm: jax.ShapeDtypeStruct | None
    """Of a step's argument of that name; None on a mesh whose devices do without."""
    tower: TowerFacts | None
    """Of a model that takes pictures."""

    @property
    def model(self) -> ModelConfig:
        return self.declaration.config

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return self.declaration.dtype

    @property
    def config(self) -> EngineConfig:
        return self.memory.config

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An abstract argument of which every device has a whole copy."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def cut(self, spec: PartitionSpec, *shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """One of which every device has a part."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    @property
    def media(self) -> jax.ShapeDtypeStruct | None:
        """The device's buffer of pictures; None: the model takes none."""
        if self.tower is None:
            return None
        tower = self.tower
        return self.array(tower.sizes.rows, tower.declaration.config.width, dtype=self.dtype)

    @functools.cached_property
    def params(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract, in the order in which `kept.bind` takes them."""
        return self.kept.abstract(self.mesh)

    def shallow(self, layers: int) -> Facts:
        """Of the same model with its first `layers` layers alone (as parameters, not arrays)."""
        model = dataclasses.replace(self.model, num_layers=min(layers, self.model.num_layers))
        of = self.declaration
        declaration = declare(model, of.dtype, of.quantization, parts=of.parts, axis=of.axis)
        found = kept(declaration, self.config.program.crossovers)
        return dataclasses.replace(self, declaration=declaration, kept=found)

    def step_model(self, variant: Variant, hooks: tuple[Hook, ...] = ()) -> step.StepModel:
        """The model over a cache of the present size, in programs that report `variant`. hooks: in
        the model."""
        program = self.config.program
        of_one = CutOps if self.mesh.size > 1 else PagedOps
        ops = of_one(
            program.attention,
            program.other_kernels,
            self.memory.num_pages,
            program.crossovers,
            fixed_tiles=program.deterministic,
        )
        top, _ = program.logprob_columns(variant.wide)
        sampler = Sampler(
            top, program.raw_logprobs, program.other_kernels, fixed_split=program.deterministic
        )
        return step.StepModel(
            self.kept.bind,
            ops,
            sampler,
            program.page_size,
            variant.payloads,
            variant.states.layers,
            hooks,
            shifted=bool(self.model.rope.sections),
        )

    def decodes_with_mosaic(self, rows: int) -> bool:
        """Whether a decode step of `rows` rows has a Mosaic kernel. (Being wrong about it only
        costs time at the first start.)"""
        model, program = self.model, self.config.program
        parts, cache = self.declaration.parts, self.memory.cache_spec.k
        q = self.array(rows, model.num_heads // parts, model.head_dim, dtype=self.dtype)
        pages = self.array(*cache.sharding.shard_shape(cache.shape), dtype=cache.dtype)
        table = self.array(rows, program.table_width)
        with jax.default_device(first_device(self.mesh)):
            name = decode_implementation(q, pages, table, program.attention)
        return name.startswith("mosaic")

    def layout(self, tokens: int) -> ExtendLayout:
        """Of the extend program of `tokens` tokens."""
        rows, fields = self.config.buckets.extend_rows(tokens), TOKEN_FIELDS
        if self.tower is not None:
            fields += (MEDIA,)
            fields += (POSITIONS,) * bool(self.model.rope.sections)
            fields += (REACH,) * bool(self.tower.sizes.pictures.block)
        return ExtendLayout(tokens, rows, self.config.program.table_width, fields)

    def packed(self, tokens: int) -> jax.ShapeDtypeStruct:
        """The vector of the extend program of `tokens` tokens."""
        return self.array(self.layout(tokens).size)

    @property
    def decode_kinds(self) -> dict[str, int]:
        """Steps of each kind of decode program: one, and where there are any, several."""
        several = self.config.program.steps_per_dispatch
        return {"decode": 1} | ({"decode_many": several} if several > 1 else {})

    def choices(self, tokens: int, rows: int) -> tuple[ProgramKey, ...]:
        """The programs that choose kernels for layers of `tokens` tokens and an LM head of `rows`
        rows: of few, for which XLA has kernels that it must time."""
        crossovers = self.config.program.crossovers
        quantized = self.declaration.quantization is not None
        most = crossovers.cublas_rows_quantized if quantized else crossovers.cublas_rows
        if not chooses_by_timing(self.config.program) or (most is not None and tokens >= most):
            return ()
        head = ((HEAD_PRODUCT, rows),) if most is None or rows < most else ()
        return ((LAYER_PRODUCTS, tokens), *head) if tokens else head

    def state(self, wide: bool = False) -> dict[str, Any]:
        """The abstract arguments of a step that an engine keeps, by name."""
        state = self.memory.state_spec._asdict()
        _, named = self.config.program.logprob_columns(wide)
        state["sparse"] = state["sparse"]._replace(
            logprob_ids=self.array(self.config.program.max_rows + 1, named)
        )
        return {"params": self.params, "cache": self.memory.cache_spec, **state}


def engine_programs(facts: Facts) -> Catalogue:
    """Every program that a batch can need. Those of requests that want what is not usual, and that
    the engine was not started for, are compiled when they are first wanted."""
    beforehand = {v: step_programs(facts, v) for v in state_programs.beforehand(facts)}
    *_, reporting = beforehand.values()
    rare = [each for each in Variant.all(facts.config.states) if each not in beforehand]
    later = [each for variant in rare for each in step_programs(facts, variant)]
    later += prompt_programs(facts, wide=True)
    return Catalogue(
        mesh=facts.mesh,
        programs=[
            *(each for steps in beforehand.values() for each in steps),
            *prompt_programs(facts, wide=False),
            *state_programs.picking_programs(facts, *reporting),
            *page_programs(facts),
            *([] if facts.tower is None else picture_programs(facts, facts.tower)),
            *choosing_programs(facts),
            *(dataclasses.replace(each, buckets=()) for each in later),
        ],
    )


def step_programs(facts: Facts, variant: Variant) -> list[Program]:
    """Extend and decode steps that report `variant`."""
    buckets, state, ending = facts.config.buckets, facts.state(variant.wide), variant.ending

    def extend(tokens: int) -> Callable[..., Any]:
        return functools.partial(step.extend_step, facts.step_model(variant), facts.layout(tokens))

    def decode(steps: int) -> Callable[[int], Callable[..., Any]]:
        return lambda rows: functools.partial(decode_steps, facts.step_model(variant), steps)

    entries = [
        Program(
            "extend" + ending,
            extend,
            {**state, "packed": facts.packed, "comm": facts.comm, "media": facts.media},
            donated=("cache", "progress", "sampled", "row_params"),
            buckets=buckets.extend[::-1],
            first=buckets.first.extend,
            ladder="extend",
            choices=lambda tokens: facts.choices(tokens, buckets.extend_rows(tokens)),
            mosaic=lambda tokens: True,
            nobody=functools.partial(no_tokens, facts),
        )
    ]
    entries += [
        Program(
            kind + ending,
            decode(steps),
            {**state, "rows": lambda rows: facts.array(2, rows), "comm": facts.comm},
            donated=("cache", "progress", "sampled"),
            buckets=buckets.decode[::-1],
            first=buckets.first.decode if steps == 1 else (),
            ladder="decode" if steps == 1 else "several",
            choices=lambda rows: facts.choices(rows, rows),
            postponed=lambda rows: bool(facts.choices(rows, rows)) and buckets.has_stand_in(rows),
            mosaic=facts.decodes_with_mosaic,
            nobody=functools.partial(no_rows, facts),
        )
        for kind, steps in facts.decode_kinds.items()
    ]
    return entries


def prompt_programs(facts: Facts, wide: bool) -> list[Program]:
    """What extend steps are asked about their prompts, a program for each payload."""
    variant = Variant(wide=wide)
    state, hidden = facts.state(wide), facts.model.hidden_size
    buckets = facts.config.buckets

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
                "hidden": lambda tokens: facts.array(tokens, hidden, dtype=facts.dtype),
            },
            buckets=buckets.extend[::-1] if each.usual else (),
            first=buckets.first.extend,
            ladder="extend",
            choices=lambda tokens: facts.choices(0, tokens),
        )
        for each in PAYLOADS
        if each.prompt is not None
    ]


def choosing_programs(facts: Facts) -> list[Program]:
    """The products of steps of few rows, see step.products."""
    width, hidden = facts.model.num_heads * facts.model.head_dim, facts.model.hidden_size

    @functools.cache
    def few() -> Facts:
        # when a choice is to be made: at most starts none is
        return facts.shallow(products.LAYERS)

    def params(tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return few().params

    def attended(tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        each = facts.cut(PartitionSpec(None, TENSOR), tokens, width, dtype=facts.dtype)
        return (each,) * few().model.num_layers

    return [
        Program(
            LAYER_PRODUCTS,
            lambda tokens: functools.partial(products.layer_products, few().step_model(USUAL)),
            {"params": params, "attended": attended, "tokens": facts.array},
        ),
        Program(
            HEAD_PRODUCT,
            lambda rows: functools.partial(products.head_product, few().step_model(USUAL)),
            {
                "params": params,
                "hidden": lambda rows: facts.array(rows, hidden, dtype=facts.dtype),
            },
        ),
    ]


def page_programs(facts: Facts) -> list[Program]:
    """Copies of pages, within the pool and to the host and back, and of a slot's sparse lists."""
    memory, layers = facts.memory, facts.model.num_layers
    cache, sparse = memory.cache_spec, memory.state_spec.sparse

    def of_layers(function: Callable[..., Any]) -> Callable[[int], Callable[..., Any]]:
        return lambda bucket: functools.partial(function, layers)

    row = {name: facts.array(*x.shape[1:], dtype=x.dtype) for name, x in sparse._asdict().items()}
    entries = [
        Program(
            "copy_pages",
            of_layers(pages.copy_pages),
            {"cache": cache, "sources": facts.array, "targets": facts.array},
            donated=("cache",),
            buckets=(pages.COPY_WIDTH,),
        ),
        Program(
            "install_sparse",
            lambda bucket: pages.install_sparse,
            {"sparse": sparse, "slot": facts.array(), **row},
            donated=("sparse",),
            buckets=(0,),
        ),
    ]
    if facts.config.host is None:
        return entries
    block = (memory.block_pages,)
    content = facts.cut(BLOCK, *memory.block_shape, dtype=memory.cache_dtype)
    return [
        *entries,
        Program(
            "gather_pages",
            of_layers(pages.gather_pages),
            {"cache": cache, "pages": facts.array},
            buckets=block,
            result=BLOCK,
        ),
        Program(
            "scatter_pages",
            of_layers(pages.scatter_pages),
            {"cache": cache, "pages": facts.array, "content": content},
            donated=("cache",),
            buckets=block,
        ),
    ]
