"""The programs of steps with chains: those that all chains share, and those of one."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.packing.buckets import Buckets
from jaxserve.packing.parts import PLAIN
from jaxserve.parallel.mesh import abstract, replicated
from jaxserve.step import chained
from jaxserve.step.catalogue import Program
from jaxserve.step.chain import Chain
from jaxserve.step.chain_rows import ChainModel, ChainState
from jaxserve.step.hook import Hook
from jaxserve.step.nobody import no_rows
from jaxserve.step.payloads import USUAL, Variant
from jaxserve.step.programs import Facts

REPLAYED = 256
"""N, tokens that one program observes of a request that is resumed."""
NOTED = 16
"""Pages of tokens that one program writes."""


@dataclasses.dataclass(frozen=True)
class ChainBuckets:
    """Rows B of the programs of steps with chains, fewer than plain steps have, because each chain
    has all of them: one, those of extend steps, powers of two beyond, and the largest."""

    decode: tuple[int, ...]
    """Of decode steps, ascending."""
    extend: tuple[int, ...]
    """Of extend steps."""

    @classmethod
    def of(cls, buckets: Buckets) -> ChainBuckets:
        """For an engine with `buckets`."""
        extend = set(map(buckets.extend_rows, buckets.extend))
        doubled = {b for b in buckets.decode if b > max(extend) and b.bit_count() == 1}
        few = {b for b in buckets.decode if b == 1 or b in extend}
        decode = few | doubled | {buckets.decode[-1]}
        return cls(tuple(sorted(decode)), tuple(sorted(extend)))

    @property
    def draw(self) -> tuple[int, ...]:
        """Of the programs that draw, the largest first."""
        return tuple(sorted({*self.decode, *self.extend}, reverse=True))

    def rows(self, rows: int) -> int:
        """The smallest bucket that holds `rows` rows of a decode step."""
        return self.decode[bisect.bisect_left(self.decode, rows)]


def forward_program(facts: Facts, hooks: tuple[Hook, ...] = ()) -> Program:
    """A decode step up to the logits, of a model with `hooks`."""
    state, reporting = facts.state(), Variant(states=facts.config.states)
    names = ("params", "cache", "progress", "sampled", "row_params")

    def forward(rows: int) -> Callable[..., Any]:
        return functools.partial(chained.forward_rows, facts.step_model(reporting, hooks))

    return Program(
        "forward",
        forward,
        {
            **{name: state[name] for name in names},
            "rows": lambda rows: facts.array(2, rows),
            "comm": facts.comm,
        },
        donated=("cache", "progress"),
        buckets=ChainBuckets.of(facts.config.buckets).decode[::-1],
        choices=lambda rows: facts.choices(rows, rows),
        mosaic=facts.decodes_with_mosaic,
        nobody=functools.partial(no_rows, facts),
    )


def shared_programs(facts: Facts) -> list[Program]:
    """What steps with any chain need."""
    buckets, state = facts.config.buckets, facts.state()
    rows = ChainBuckets.of(buckets)
    hidden, dtype = facts.model.hidden_size, facts.dtype
    model = functools.partial(facts.step_model, USUAL)

    programs = [
        forward_program(facts),
        Program(
            "pick",
            lambda tokens: chained.pick_rows,
            {
                "sampled": state["sampled"],
                "hidden": lambda tokens: facts.array(tokens, hidden, dtype=dtype),
                "tokens": lambda tokens: facts.array(buckets.extend_rows(tokens)),
                "places": lambda tokens: facts.array(2, buckets.extend_rows(tokens)),
            },
            buckets=buckets.extend[::-1],
        ),
        Program(
            "head",
            lambda rows: functools.partial(chained.head_rows, model()),
            {
                "params": state["params"],
                "hidden": lambda rows: facts.array(rows, hidden, dtype=dtype),
            },
            buckets=rows.extend[::-1],
            choices=lambda rows: facts.choices(0, rows),
        ),
        Program(
            "note_tokens",
            lambda count: chained.note_tokens,
            {
                "token_pages": token_pages(facts),
                "pages": facts.array,
                "tokens": lambda count: facts.array(count, facts.config.program.page_size),
            },
            donated=("token_pages",),
            buckets=(NOTED,),
        ),
    ]
    if facts.config.states.names:
        programs += inside_programs(facts)
    for variant in Variant.all():
        given = {**_kept(facts, variant), **_given(facts)}
        programs.append(
            Program(
                PLAIN + variant.ending,
                _drawing(chained.draw_rows, facts, variant),
                given,
                donated=("sampled",),
                buckets=rows.draw if variant == USUAL else (),
            )
        )
    return programs


def inside_programs(facts: Facts) -> list[Program]:
    """What reports the model's inside of rows that are drawn apart."""
    buckets, states = facts.config.buckets, facts.config.states
    inner = {"layers": functools.partial(_layers, facts)} if states.layers else {}
    programs = [
        Program(
            "inside",
            lambda rows: functools.partial(chained.inside_rows, states.names),
            {"undrawn": _given(facts)["undrawn"], **inner},
            buckets=ChainBuckets.of(buckets).draw,
        )
    ]
    if inner:
        places = {"places": lambda tokens: facts.array(2, buckets.extend_rows(tokens))}
        pick = Program(
            "pick_layers",
            lambda tokens: chained.pick_layers,
            {**inner, **places},
            buckets=buckets.extend[::-1],
        )
        programs.append(pick)
    return programs


def editing_programs(facts: Facts) -> list[Program]:
    """What takes rows' logits to guides that edit them, and back."""
    rows = ChainBuckets.of(facts.config.buckets).draw

    def logits(rows: int) -> jax.ShapeDtypeStruct:
        return facts.array(rows, facts.model.vocab_size, dtype=jnp.float32)

    row = {"logits": logits, "row": facts.array()}
    bits = {"bits": lambda rows: facts.array(rows, mask_words(facts))}
    values = facts.array(facts.model.vocab_size, dtype=jnp.float32)
    return [
        Program(
            "adjusted",
            _drawing(chained.adjusted_rows, facts, USUAL),
            {**_kept(facts, USUAL), "logits": logits, "slots": facts.array, **bits},
            buckets=rows,
        ),
        Program("peek", lambda rows: chained.peek_row, row, buckets=rows),
        Program("poke", lambda rows: chained.poke_row, {**row, "values": values}, buckets=rows),
    ]


def chain_programs(facts: Facts, chain: Chain) -> list[Program]:
    """What steps with `chain` need beside."""
    kept, tables = abstract_state(facts, chain), abstract_tables(facts, chain)
    names, buckets = chain_arrays(chain), ChainBuckets.of(facts.config.buckets)
    history = {"token_pages": token_pages(facts)} if chain.history else {}
    inner = functools.partial(_layers, facts)
    read = history | ({"layers": inner} if chain.layers else {})
    read |= {"params": facts.params} if chain.head else {}

    draw = functools.partial(chained.draw_chained, chain_model(facts, chain), tuple(read))
    programs = [
        Program(
            chain.kind + variant.ending,
            _drawing(draw, facts, variant),
            {
                **_kept(facts, variant),
                names.state: kept,
                names.tables: tables,
                **_given(facts),
                **read,
            },
            donated=("sampled", names.state, *history),
            buckets=buckets.draw if variant == USUAL else (),
        )
        for variant in Variant.all()
    ]
    admit = Program(
        f"admit_{chain.kind}",
        lambda count: functools.partial(chained.admit_row, chain),
        {
            names.state: kept,
            names.tables: tables,
            "slot": facts.array(),
            "floats": facts.array(chain.spec.floats, dtype=jnp.float32),
            "ints": facts.array(chain.spec.ints),
            "fresh": facts.array(),
            "tokens": facts.array,
            "logprobs": lambda count: facts.array(count, dtype=jnp.float32),
            "count": facts.array(),
        },
        donated=(names.state,),
        buckets=(REPLAYED,),
    )
    return [*programs, admit]


@dataclasses.dataclass(frozen=True)
class ChainArrays:
    """Names of what the device keeps for a chain."""

    state: str
    """A `ChainState`."""
    tables: str
    """Its tables, by name."""


def chain_arrays(chain: Chain) -> ChainArrays:
    """Those of `chain`."""
    return ChainArrays(f"state of {chain.kind}", f"tables of {chain.kind}")


def chain_model(facts: Facts, chain: Chain) -> ChainModel:
    """`chain` as programs see it."""
    return ChainModel(chain, facts.model.num_layers, facts.config.states.layers)


def abstract_state(facts: Facts, chain: Chain) -> Any:
    """A `ChainState` of every slot."""
    rows = facts.config.program.max_rows + 1
    return abstract(
        jax.eval_shape(functools.partial(ChainState.empty, chain, rows)), replicated(facts.mesh)
    )


def abstract_tables(facts: Facts, chain: Chain) -> dict[str, jax.ShapeDtypeStruct]:
    """By name."""
    return {name: facts.array(*x.shape, dtype=x.dtype) for name, x in chain.tables.items()}


def token_pages(facts: Facts) -> jax.ShapeDtypeStruct:
    """The tokens beside their keys and values, [P, S] int32."""
    return facts.array(facts.memory.num_pages, facts.config.program.page_size)


def _drawing(
    function: Callable[..., Any], facts: Facts, variant: Variant
) -> Callable[[int], Callable[..., Any]]:
    return lambda rows: functools.partial(function, facts.step_model(variant))


def _kept(facts: Facts, variant: Variant) -> dict[str, Any]:
    """What the device keeps that programs read to draw."""
    state = facts.state(variant.wide)
    return {name: state[name] for name in ("progress", "sampled", "row_params", "sparse")}


def _given(facts: Facts) -> dict[str, Any]:
    """What programs that draw B rows are given."""
    hidden, vocabulary = facts.model.hidden_size, facts.model.vocab_size

    def undrawn(rows: int) -> chained.Undrawn:
        of_hidden = facts.array(rows, hidden, dtype=facts.dtype)
        of_logits = facts.array(rows, vocabulary, dtype=jnp.float32)
        return chained.Undrawn._make((of_hidden, of_logits, facts.array(rows)))

    def said(rows: int) -> chained.Said:
        return chained.Said(facts.array(rows, mask_words(facts)), facts.array(rows))

    return {"undrawn": undrawn, "slots": facts.array, "said": said}


def _layers(facts: Facts, rows: int) -> jax.ShapeDtypeStruct:
    """Of the inner layers that programs report, [rows, C, D]."""
    count = len(facts.config.states.layers)
    return facts.array(rows, count, facts.model.hidden_size, dtype=facts.dtype)


def mask_words(facts: Facts) -> int:
    """int32 numbers with a bit for each token."""
    return -(-facts.model.vocab_size // 32)
