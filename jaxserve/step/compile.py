"""Ahead-of-time programs, one per bucket, and the count of those compiled too late."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.compat import Settings, on_backend_compile, without_compilation_cache
from jaxserve.parallel.mesh import first_device
from jaxserve.step.catalogue import Lowerable, ProgramKey
from jaxserve.step.notice import Notice
from jaxserve.step.stored import StoredPrograms

logger = logging.getLogger(__name__)

Builder = Callable[[ProgramKey], Lowerable]
CompilerOptions = Callable[[int], dict[str, str | bool]]
"""bucket -> XLA's options."""


class Programs:
    """Compiled executables by key.

    A program is compiled, or loaded from `stored`, on first use, or by `precompile`. Late compiles
    are those after `precompile`, and any XLA compilation on the engine thread that is not the first
    use of a program: a shape that slipped through the buckets.
    """

    def __init__(
        self, builder: Builder, mesh: Mesh, options: CompilerOptions,
        stored: StoredPrograms | None = None,
    ):  # fmt: skip
        self._builder = builder
        self._mesh = mesh
        self._options = options
        self._stored = stored
        self._settings = Settings.here()
        self._notice = Notice()
        self._compiled: dict[ProgramKey, Any] = {}
        self._memory: dict[ProgramKey, int] = {}
        self._expected = threading.local()
        self._lowering = threading.Lock()
        self._engine_thread: int | None = None
        self._complete = False
        self.late_compiles = 0
        self.compile_seconds = 0.0
        self._stop_listening = on_backend_compile(self._on_compile)

    def watch_this_thread(self) -> None:
        """Compilations on the calling thread count as late unless a first use explains them."""
        self._engine_thread = threading.get_ident()

    def close(self) -> None:
        """Let go of the executables, whoever still holds this object (an exception's traceback,
        say): each takes memory and, on a CPU, some 250 of a process's 65,530 mappings."""
        self._stop_listening()
        self._compiled.clear()

    def __call__(self, key: ProgramKey, *args: Any) -> Any:
        """Run the program on arrays of its exact shapes."""
        program = self._compiled.get(key)
        if program is None:
            with self._fresh(), self._notice.shown([_name(key)]):
                program = self._compile(key, late=self._complete)
        return program(*args)

    def _fresh(self) -> contextlib.AbstractContextManager[None]:
        """Programs to be stored must not come from JAX's cache."""
        return contextlib.nullcontext() if self._stored is None else without_compilation_cache()

    def __len__(self) -> int:
        return len(self._compiled)

    def memory(self, key: ProgramKey) -> int:
        """Bytes the program needs beside its arguments: temporaries, and results in other places
        than those of donated arguments."""
        self.build([key], threads=1)
        return self._memory[key]

    def build(self, keys: Iterable[ProgramKey], threads: int) -> None:
        """Compile `keys` in parallel (XLA compiles outside the interpreter lock), the first ones
        first."""
        missing = [key for key in keys if key not in self._compiled]
        pool = ThreadPoolExecutor(threads, "jaxserve-compile")
        notice = self._notice.shown([_name(key) for key in missing])
        with self._fresh(), _without_garbage_collection(), notice as ready, pool:

            def make(key: ProgramKey) -> None:
                self._compile(key, late=False)
                ready()

            list(pool.map(make, missing))

    def precompile(self, keys: Iterable[ProgramKey], threads: int) -> None:
        """`build` everything there is: what is compiled after this is late."""
        self.build(keys, threads)
        self._complete = True

    def _compile(self, key: ProgramKey, late: bool) -> Any:
        # On whichever thread: a builder may trace, too, to learn shapes. Shardings say where a
        # program runs; kernels are chosen for the default device.
        with self._settings.applied(), jax.default_device(first_device(self._mesh)):
            return self._make(key, late)

    def _make(self, key: ProgramKey, late: bool) -> Any:
        started = time.perf_counter()
        function, abstract, donated = self._builder(key)
        name = _name(key)
        options = self._options(key[1])
        file, found = "", None
        if self._stored is not None:
            file = self._stored.name(name, abstract, donated, options)
            found = self._stored.load(file)
        if found is not None:
            program, self._memory[key] = found
        else:
            self._expected.active = True
            try:
                program = jax.jit(_named(function, name), donate_argnums=donated)
                # Python, so one at a time at best: in turn, XLA has work after the first program;
                # side by side, all threads end late and together
                with self._lowering:
                    lowered = program.lower(*abstract)
                with self._notice.compiling():
                    program = lowered.compile(options)
            finally:
                self._expected.active = False
            self._memory[key] = _memory_beside_arguments(program)
            if self._stored is not None:
                self._stored.store(file, program, self._memory[key])
        seconds = time.perf_counter() - started
        self._compiled[key] = program
        self.compile_seconds += seconds
        if late:
            self.late_compiles += 1
            logger.warning("late compile of %s[%d]: %.1f s", *key, seconds)
        else:
            how = "compiled" if found is None else "loaded"
            logger.info("%s %s[%d] in %.1f s", how, *key, seconds)
        return program

    def _on_compile(self, seconds: float) -> None:
        on_engine = threading.get_ident() == self._engine_thread
        if on_engine and not getattr(self._expected, "active", False):
            self.late_compiles += 1
            logger.warning("unplanned compile on the engine thread: %.2f s", seconds)


def _memory_beside_arguments(program: Any) -> int:
    analysis = program.memory_analysis()
    if analysis is None:
        return 0
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.temp_size_in_bytes + max(results, 0))


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Cycles stay for as long as the block takes. Tracing makes so many objects that looking for
    them is a sixth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _name(key: ProgramKey) -> str:
    return f"{key[0]}_{key[1]}"


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function under its program's name, which traces and dumps show."""

    def program(*args: Any) -> Any:
        return function(*args)

    program.__name__ = name
    return program
