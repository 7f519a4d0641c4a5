"""What can be compiled: an entry for each kind of program, which a feature adds by listing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

ProgramKey = tuple[str, int]
"""(kind, bucket), for example ("decode", 16); of a step, the bucket is the tokens it computes."""


class Lowerable(NamedTuple):
    """One program before it is traced."""

    function: Callable[..., Any]
    """Of `arguments`, by position; returns (the donated ones as they are afterwards, the rest)."""
    arguments: tuple[Any, ...]
    """Abstract: trees of jax.ShapeDtypeStruct."""
    donated: tuple[int, ...]
    """Numbers of the arguments whose memory the results take."""


def never(bucket: int) -> bool:
    return False


def nothing(bucket: int) -> tuple[ProgramKey, ...]:
    return ()


def no_step(bucket: int) -> Mapping[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One kind of program, compiled for each of its buckets.

    Arguments have names: those that an engine keeps between steps (`params`, `cache`, the fields of
    DeviceState) are found by them, the others come with the call.
    """

    kind: str
    function: Callable[[int], Callable[..., Any]]
    """bucket -> function of the arguments, by position, that returns (the donated ones as they are
    afterwards, in the order of `donated`; anything)."""
    arguments: Mapping[str, Any]
    """By name, in the function's order: trees of jax.ShapeDtypeStruct, or functions of the bucket
    that return one."""
    donated: tuple[str, ...] = ()
    """Arguments that the program takes over and gives back."""
    buckets: tuple[int, ...] = ()
    """Compiled without anybody asking, in this order; others when they are first wanted."""
    first: tuple[int, ...] | None = None
    """Those of them that an engine cannot answer without; None is all."""
    ladder: str = ""
    """Which ladder of sizes the buckets are rungs of: "extend", "decode" or "several" (decode
    steps). A rung can be used when all programs of it are there. "": of none."""
    choices: Callable[[int], tuple[ProgramKey, ...]] = nothing
    """The programs whose compilation at rest makes XLA choose kernels for that of a bucket, see
    step.products."""
    postponed: Callable[[int], bool] = never
    """Whether the program of a bucket can wait until nothing runs: its kernels have to be timed,
    and larger programs do almost as well until then."""
    mosaic: Callable[[int], bool] = never
    """Whether the program of a bucket has a Mosaic kernel: those are compiled first."""
    nobody: Callable[[int], Mapping[str, Any]] = no_step
    """Of a step: arguments with which it changes nothing but padding, see `step.first_runs`."""
    result: PartitionSpec = dataclasses.field(default_factory=PartitionSpec)
    """How what it returns beside the donated arguments is cut over several devices; the default is
    not at all: all of them compute the same."""


class Catalogue:
    """The programs of one engine, by kind."""

    def __init__(self, programs: Iterable[Program], mesh: Mesh) -> None:
        """mesh: where they run. ValueError: two programs of the same kind."""
        self._programs: dict[str, Program] = {}
        self._mesh = mesh
        for program in programs:
            if not self.add(program):
                raise ValueError(f"two programs are called {program.kind!r}")

    def add(self, program: Program) -> bool:
        """One more, from any thread; False: there is one of its kind, and it stays."""
        return self._programs.setdefault(program.kind, program) is program

    def __getitem__(self, kind: str) -> Program:
        return self._programs[kind]

    def lowerable(self, key: ProgramKey) -> Lowerable:
        """The program `key`, not traced yet."""
        kind, bucket = key
        program = self._programs[kind]
        specs = [spec(bucket) if callable(spec) else spec for spec in program.arguments.values()]
        donated = tuple(map(list(program.arguments).index, program.donated))
        function = program.function(bucket)
        if self._mesh.size > 1:
            cut = [jax.tree.map(lambda x: x.sharding.spec, spec) for spec in specs]
            function = jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=tuple(cut),
                out_specs=(tuple(cut[i] for i in donated), program.result),
                check_vma=False,
            )
        return Lowerable(function, tuple(specs), donated)

    def mosaic_first(self, keys: Iterable[ProgramKey]) -> list[ProgramKey]:
        """`keys` in the order in which they are best compiled: those with Mosaic kernels first.

        Such a kernel is compiled with options of LLVM that are not XLA's, so it waits until no
        other program is in LLVM, and its program waits with it (jaxlib 0.11.2). Among programs
        without, that is at the end.
        """
        return sorted(keys, key=lambda key: not self._programs[key[0]].mosaic(key[1]))

    def beforehand(self) -> list[ProgramKey]:
        """Everything that is compiled without anybody asking."""
        return [(program.kind, b) for program in self._programs.values() for b in program.buckets]

    def first(self) -> list[ProgramKey]:
        """Those of `beforehand` that an engine cannot answer without."""
        return [key for key in self.beforehand() if self._is_first(key)]

    def postponed(self, keys: Iterable[ProgramKey]) -> set[ProgramKey]:
        """Those of `keys` that can wait until nothing runs."""
        return {(kind, bucket) for kind, bucket in keys if self._programs[kind].postponed(bucket)}

    def choices(self, keys: Iterable[ProgramKey]) -> list[ProgramKey]:
        """The programs that are to be compiled at rest, so that `keys` need not be."""
        wanted = (self._programs[kind].choices(bucket) for kind, bucket in keys)
        return sorted({key for each in wanted for key in each})

    def rungs(self, ladder: str, ready: Container[ProgramKey]) -> frozenset[int]:
        """The buckets of `ladder` of which every program is among `ready`."""
        programs = [p for p in self._programs.values() if p.ladder == ladder and p.buckets]
        wanted = {bucket for program in programs for bucket in program.buckets}
        return frozenset(
            bucket
            for bucket in wanted
            if all((p.kind, bucket) in ready for p in programs if bucket in p.buckets)
        )

    def _is_first(self, key: ProgramKey) -> bool:
        first = self._programs[key[0]].first
        return first is None or key[1] in first
