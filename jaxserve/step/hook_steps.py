"""Hooks of one runner: their programs, and what steps with hooked requests are given."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.chains.use import ChainUse
from jaxserve.packing.batch import Batch
from jaxserve.parallel.mesh import abstract, replicated
from jaxserve.step import step
from jaxserve.step.catalogue import Program
from jaxserve.step.chain_programs import forward_program
from jaxserve.step.hook import Hook, trace_hook
from jaxserve.step.hooked import HookState, admit_hook
from jaxserve.step.payloads import USUAL, Variant
from jaxserve.step.programs import Facts, step_programs


class Hooked(NamedTuple):
    """What the hooks of a batch mean for the program that runs its model."""

    ending: str = ""
    """Of the program's kind."""
    given: Mapping[str, Any] = MappingProxyType({})
    """Further arguments."""


class Built(NamedTuple):
    """A hook whose programs are there."""

    hook: Hook
    """As it was asked for."""
    hooks: tuple[Hook, ...]
    """All that those programs have, in the order of their numbers."""


class HookSteps:
    """A batch with a hooked request runs programs that have all hooks, each for the rows that have
    it. They are compiled anew with each further hook."""

    def __init__(
        self,
        facts: Facts,
        build: Callable[[list[Program]], None],
        run: Callable[..., Any],
        arrays: dict[str, Any],
    ) -> None:
        """build: compiles programs on the calling thread. The others as of `ChainSteps`."""
        self._facts, self._build = facts, build
        self._run, self._arrays = run, arrays
        self._building = threading.Lock()
        self._built: tuple[Hook, ...] = ()
        self._adopted: tuple[Hook, ...] = ()

    # -- registering ------------------------------------------------------------------------------

    def build(self, name: str, points: Any, params: Any, tables: Any) -> Built:
        """Trace a hook and compile the model with it and all before it, on the calling thread.
        InvalidRequestError: it cannot be."""
        facts = self._facts
        hook = trace_hook(name, points, params, tables, facts.model, facts.dtype)
        with self._building:
            if hook.kind in (each.kind for each in self._built):
                return Built(hook, self._built)
            hooks = (*self._built, hook)
            self._build(hook_programs(facts, hooks))
            self._built = hooks
        return Built(hook, hooks)

    def adopt(self, built: Built) -> None:
        """Run them from now on. On the engine thread, between two steps."""
        new = built.hooks[len(self._adopted) :]
        for hook in new:
            self._make(hook)
        self._adopted += new

    def reset(self) -> None:
        """Make anew what the device has lost."""
        for hook in self._adopted:
            self._make(hook)

    def _make(self, hook: Hook) -> None:
        state = _empty(hook, self._facts.config.program.max_rows + 1)
        self._arrays[_array(hook)] = jax.device_put(state, replicated(self._facts.mesh))

    # -- steps ------------------------------------------------------------------------------------

    def of(self, batch: Batch, rows: int) -> Hooked:
        """Of a batch whose program has `rows` rows."""
        used = {
            number: sequence.request.hook.chain.kind
            for number, sequence in enumerate(batch.sequences)
            if sequence.request.hook is not None
        }
        if not used:
            return Hooked()
        numbers = {hook.kind: number for number, hook in enumerate(self._adopted, 1)}
        hooked = np.zeros(rows, np.int32)
        hooked[list(used)] = [numbers[kind] for kind in used.values()]
        return Hooked(_ending(self._adopted), {"hooked": hooked})

    def admit(self, use: ChainUse, slot: int) -> None:
        """Queue what a row that begins `slot` needs before the step."""
        key = (f"admit_{use.chain.kind}", 0)
        self._run(key, slot=np.int32(slot), floats=use.floats, ints=use.ints)


def hook_programs(facts: Facts, hooks: tuple[Hook, ...]) -> list[Program]:
    """Extend steps, and decode steps up to the logits, of a model with `hooks`."""
    ending = _ending(hooks)
    rows = facts.config.program.max_rows + 1
    states = {
        _array(hook): abstract(
            jax.eval_shape(functools.partial(_empty, hook, rows)), replicated(facts.mesh)
        )
        for hook in hooks
    }

    def with_hooks(program: Program, count: Callable[[int], int], function: Any) -> Program:
        return dataclasses.replace(
            program,
            kind=program.kind + ending,
            function=function,
            arguments={
                **program.arguments,
                "hooked": lambda bucket: facts.array(count(bucket)),
                **states,
            },
            first=None,
            ladder="",
        )

    def extend(variant: Variant) -> Callable[[int], Callable[..., Any]]:
        model = functools.cache(lambda: facts.step_model(variant, hooks))
        return lambda tokens: functools.partial(step.extend_step, model(), facts.layout(tokens))

    reporting = Variant(states=facts.config.states)
    forward = forward_program(facts, hooks)
    programs = [with_hooks(forward, lambda bucket: bucket, forward.function)]
    for variant in Variant.all(facts.config.states):
        program = step_programs(facts, variant)[0]
        if variant not in (USUAL, reporting):
            program = dataclasses.replace(program, buckets=())
        programs.append(with_hooks(program, facts.config.buckets.extend_rows, extend(variant)))
    hook = hooks[-1]
    spec = hook.spec
    admit = Program(
        f"admit_{hook.kind}",
        lambda bucket: admit_hook,
        {
            _array(hook): states[_array(hook)],
            "slot": facts.array(),
            "floats": facts.array(spec.floats, dtype=jnp.float32),
            "ints": facts.array(spec.ints),
        },
        donated=(_array(hook),),
        buckets=(0,),
    )
    return [*programs, admit]


def _empty(hook: Hook, rows: int) -> HookState:
    """Of `rows` = R + 1 slots, on the host."""
    spec = hook.spec
    floats, ints = np.zeros((rows, spec.floats), np.float32), np.zeros((rows, spec.ints), np.int32)
    return HookState(floats, ints, hook.tables)


def _array(hook: Hook) -> str:
    """The name of what the device keeps for it."""
    return f"state of {hook.kind}"


def _ending(hooks: tuple[Hook, ...]) -> str:
    kinds = "".join([hook.kind for hook in hooks])
    return f"_hooked_{hashlib.sha256(kinds.encode()).hexdigest()[:16]}"
