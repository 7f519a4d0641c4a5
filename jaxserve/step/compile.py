"""Ahead-of-time programs, one per bucket, and the count of those compiled too late."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.sharding import Mesh

from jaxserve.compat import on_backend_compile
from jaxserve.step.catalogue import Lowerable, ProgramKey
from jaxserve.step.compiler import Compiler
from jaxserve.step.shared import Turns
from jaxserve.step.stored import StoredPrograms
from jaxserve.step.workers import Workers
from jaxserve.step.xla_options import CompilerOptions, Options

logger = logging.getLogger(__name__)

Builder = Callable[[ProgramKey], Lowerable]


class Programs:
    """Compiled executables by key.

    A program is compiled, or loaded from `stored`, on first use, by `build`, or by `build_behind`
    while others run. Late compiles are first uses after `expect_no_more`, and any XLA compilation
    on the engine thread that is not the first use of a program: a shape that slipped through the
    buckets.
    """

    def __init__(
        self,
        builder: Builder,
        mesh: Mesh,
        options: CompilerOptions,
        stored: StoredPrograms | None = None,
        turns: Turns | None = None,
    ):
        """turns: of all who use `stored`."""
        self._builder = builder
        self._options = options
        self._stored = stored
        self._turns = turns or Turns()
        self._notice = self._turns.notice
        self._compiler = Compiler(mesh, self._notice, stored)
        self._compiled: dict[ProgramKey, Any] = {}
        self._memory: dict[ProgramKey, int] = {}
        self._engine_thread: int | None = None
        self._complete = False
        self.closed = threading.Event()
        self._behind: Workers[ProgramKey] | None = None
        self._wanted: list[ProgramKey] = []
        self._untimed: set[ProgramKey] = set()
        self._resting: set[ProgramKey] = set()
        self._timed_again: set[ProgramKey] = set()
        self._used = 0.0
        self.late_compiles = 0
        self.compile_seconds = 0.0
        """Of all threads, loading included."""
        self.engine_seconds = 0.0
        """Of them, what the engine thread waited for."""
        self._stop_listening = on_backend_compile(self._on_compile)

    def watch_this_thread(self) -> None:
        """Compilations on the calling thread count as late unless a first use explains them."""
        self._engine_thread = threading.get_ident()

    def close(self) -> None:
        """Let go of the executables, whoever still holds this object (an exception's traceback,
        say): each takes memory and, on a CPU, some 250 of a process's 65,530 mappings. What is
        being compiled is not waited for."""
        self._stop_listening()
        if self._behind is not None:
            self._behind.stop()
        self.closed.set()
        self._compiled.clear()

    def program(self, key: ProgramKey) -> Any:
        """The executable, which is about to be queued."""
        self._used = time.monotonic()
        program = self._compiled.get(key)
        if program is None:
            started = time.perf_counter()
            with self._compiler.fresh(), self._notice.shown([_name(key)]):
                program = self._compile(key, late=self._complete)
            self.engine_seconds += time.perf_counter() - started
        return program

    def present(self) -> list[tuple[ProgramKey, Any]]:
        """Those that are there, with their executables."""
        return list(self._compiled.items())

    def __len__(self) -> int:
        return len(self._compiled)

    def __contains__(self, key: object) -> bool:
        return key in self._compiled

    @property
    def compiling(self) -> int:
        """Programs that are still to come, without anybody asking for them."""
        behind = self._behind
        if behind is None or not behind.busy:
            return 0
        return len(self._missing(self._wanted))

    @property
    def untimed(self) -> int:
        """Programs for which XLA timed nothing, because requests ran while they were compiled, and
        those that are not even compiled before it can."""
        return len(self._untimed | self._resting)

    @property
    def used_at(self) -> float:
        """When a program was last queued, by time.monotonic()."""
        return self._used

    def memory(self, key: ProgramKey) -> int:
        """Bytes the program needs beside its arguments: temporaries, and results in other places
        than those of donated arguments."""
        self.build([key], threads=1)
        return self._memory[key]

    def load(self, keys: Iterable[ProgramKey], threads: int, timed_only: bool = True) -> None:
        """Those of `keys` that are stored. timed_only: not those for which XLA timed nothing."""
        if self._stored is not None:
            load = functools.partial(self._load, timed_only=timed_only)
            Workers.finish(Workers(load, self._missing(keys), threads))

    def stored(self, keys: Iterable[ProgramKey]) -> set[ProgramKey]:
        """Those of `keys` that need only be loaded, timed or not, as far as names of files tell."""
        stored = self._stored
        if stored is None:
            return set()

        def there(key: ProgramKey) -> bool:
            with self._compiler.on_device():
                lowerable = self._builder(key)
                every = [self._options(key[1], timed=timed) for timed in (True, False)]
            return any(stored.has(self._file(stored, key, lowerable, each)) for each in every)

        return set(filter(there, keys))

    def build(
        self,
        keys: Iterable[ProgramKey],
        threads: int,
        choices: Iterable[ProgramKey] = (),
        *,
        at_rest: bool = True,
    ) -> None:
        """Compile `keys` in parallel (XLA compiles outside the interpreter lock), the first ones
        first. choices: programs that are compiled for what XLA learns by it, and forgotten; one
        after the other beside `keys`, as XLA times one program at a time, unless its choices are
        stored. at_rest: XLA may time kernels, because nothing else uses the device."""
        missing = self._missing(keys)
        notice = self._notice.shown([_name(key) for key in missing])
        with self._compiler.fresh(), notice as ready:

            def make(key: ProgramKey) -> None:
                self._compile(key, at_rest=at_rest)
                ready()

            with self._compiler.on_device():
                # before the large ones are traced, which would keep each of them waiting
                lowered = list(self._lowered_choices(choices))
            work = [Workers(self._choose, lowered, 1), Workers(make, missing, threads)]
            Workers.finish(*work)

    def build_behind(self, keys: Iterable[ProgramKey], threads: int) -> None:
        """Load or compile `keys` while requests run, but for those that are postponed, each stored
        as soon as it is compiled. One that fails is logged; it is then missing."""
        self._wanted = [key for key in self._missing(keys) if key not in self._resting]

        def make(key: ProgramKey) -> None:
            try:
                with self._compiler.fresh():
                    self._compile(key, at_rest=False)
            except Exception:
                logger.exception("%s[%d] could not be compiled; larger programs serve", *key)

        self._behind = Workers(make, self._wanted, threads)

    def postpone(self, keys: Iterable[ProgramKey]) -> None:
        """Leave `keys` to `time_one`; larger programs serve until then."""
        self._resting.update(self._missing(keys))

    def time_one(self) -> bool:
        """Compile one of the `untimed` programs with timing, and take it from now on. False: there
        is none that has not been tried. Only while nothing runs: if a program was queued meanwhile,
        the times are worth nothing, and the program stays as it was. (It is not tried again: XLA
        remembers what it timed.)"""
        key = min((self._untimed | self._resting) - self._timed_again, default=None)
        if key is None:
            return False
        self._timed_again.add(key)
        started, began = time.perf_counter(), time.monotonic()
        with self._turns.of(key), self._compiler.fresh():
            if self._load(key, timed_only=True) is None:  # else another replica has timed it
                with self._compiler.on_device():
                    lowerable, options = self._builder(key), self._options(key[1])
                    program = self._compiler.compile(self._lower(key, lowerable), options)
                    if self._used >= began:
                        return True
                    self._store(key, lowerable, program, options)
                    self._keep(key, program, "timed", started, late=False)
            self._untimed.discard(key)
            self._resting.discard(key)
        return True

    def expect_no_more(self) -> None:
        """What is compiled on first use from now on is late."""
        self._complete = True

    def _missing(self, keys: Iterable[ProgramKey]) -> list[ProgramKey]:
        return [key for key in dict.fromkeys(keys) if key not in self._compiled]

    def _compile(self, key: ProgramKey, *, late: bool = False, at_rest: bool = True) -> Any:
        with self._turns.of(key):
            program = self._load(key, timed_only=at_rest, late=late)
            if program is None:
                started = time.perf_counter()
                with self._compiler.on_device():
                    program = self._make(key, at_rest)
                self._keep(key, program, "compiled", started, late)
        return program

    def _load(self, key: ProgramKey, timed_only: bool, late: bool = False) -> Any | None:
        """The stored program; None where there is none."""
        if self._stored is None:
            return None
        started = time.perf_counter()
        with self._compiler.on_device():
            program = self._find(self._stored, key, timed_only)
        if program is not None:
            self._keep(key, program, "loaded", started, late)
        return program

    def _lowered_choices(self, keys: Iterable[ProgramKey]) -> Iterator[tuple[ProgramKey, Any, str]]:
        """Those of `keys` that nobody has compiled yet: lowered, and under which name it is noted
        that they were. In `on_device`."""
        for key in filter(self._turns.claim, keys):
            lowerable, name = self._builder(key), ""
            if self._stored is not None:
                name = self._file(self._stored, key, lowerable, self._options(key[1]))
                if self._stored.noted(name):
                    continue
            yield key, self._lower(key, lowerable), name

    def _choose(self, job: tuple[ProgramKey, Any, str]) -> None:
        key, lowered, name = job
        started = time.perf_counter()
        with self._compiler.on_device():
            self._compiler.compile(lowered, self._options(key[1]), alone=True)
            if self._stored is not None:
                self._stored.note(name)
        logger.info("kernels of %s[%d] chosen in %.1f s", *key, time.perf_counter() - started)

    def _keep(self, key: ProgramKey, program: Any, how: str, started: float, late: bool) -> None:
        if not self.closed.is_set():
            self._compiled[key] = program
        seconds = time.perf_counter() - started
        self.compile_seconds += seconds
        if late:
            self.late_compiles += 1
            logger.warning("late compile of %s[%d]: %.1f s", *key, seconds)
        else:
            logger.info("%s %s[%d] in %.1f s", how, *key, seconds)

    def _find(self, stored: StoredPrograms, key: ProgramKey, timed_only: bool) -> Any | None:
        lowerable = self._builder(key)
        for timed in (True,) if timed_only else (True, False):
            options = self._options(key[1], timed=timed)
            found = stored.load(self._file(stored, key, lowerable, options), options)
            if found is not None:
                program, self._memory[key] = found
                self._note(key, timed)
                return program
        return None

    def _make(self, key: ProgramKey, timed: bool) -> Any:
        lowerable, options = self._builder(key), self._options(key[1], timed=timed)
        alone = timed and threading.get_ident() != self._engine_thread
        program = self._compiler.compile(self._lower(key, lowerable), options, alone=alone)
        self._store(key, lowerable, program, options)
        self._note(key, timed)
        return program

    def _store(self, key: ProgramKey, lowerable: Lowerable, program: Any, options: Options) -> None:
        self._memory[key] = _memory_beside_arguments(program)
        if self._stored is not None:
            file = self._file(self._stored, key, lowerable, options)
            self._stored.store(file, program, self._memory[key])

    def _note(self, key: ProgramKey, timed: bool) -> None:
        if not timed and self._options(key[1], timed=False) != self._options(key[1]):
            self._untimed.add(key)

    def _lower(self, key: ProgramKey, lowerable: Lowerable) -> Any:
        return self._compiler.lower(_name(key), lowerable)

    def _file(
        self, stored: StoredPrograms, key: ProgramKey, lowerable: Lowerable, options: Options
    ) -> str:
        return stored.name(_name(key), lowerable.arguments, lowerable.donated, options)

    def _on_compile(self, seconds: float) -> None:
        on_engine = threading.get_ident() == self._engine_thread
        if on_engine and not self._compiler.is_at_work:
            self.late_compiles += 1
            logger.warning("unplanned compile on the engine thread: %.2f s", seconds)


def _memory_beside_arguments(program: Any) -> int:
    analysis = program.memory_analysis()
    if analysis is None:
        return 0
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.temp_size_in_bytes + max(results, 0))


def _name(key: ProgramKey) -> str:
    return f"{key[0]}_{key[1]}"
