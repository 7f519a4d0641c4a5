"""Lowering and XLA, on any thread, for the devices of one engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.compat import Settings, without_compilation_cache
from jaxserve.parallel.mesh import first_device
from jaxserve.step.catalogue import Lowerable
from jaxserve.step.notice import Notice
from jaxserve.step.stored import StoredPrograms
from jaxserve.step.tracing import named, without_garbage_collection
from jaxserve.step.xla_options import Options


class Compiler:
    """Makes executables, with JAX's settings of the thread on which it was made itself."""

    def __init__(self, mesh: Mesh, notice: Notice, stored: StoredPrograms | None) -> None:
        """stored: where what is made will be kept, and what XLA chooses is."""
        self._mesh = mesh
        self._notice = notice
        self._stored = stored
        self._settings = Settings.here()
        self._at_work = threading.local()
        self._lowering = threading.Lock()

    @property
    def is_at_work(self) -> bool:
        """Whether XLA compiles for this object on the calling thread."""
        return getattr(self._at_work, "active", False)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """On whichever thread: a builder may trace, too, to learn shapes. Shardings say where a
        program runs; kernels are chosen for the default device."""
        with self._settings.applied(), jax.default_device(first_device(self._mesh)):
            yield

    def fresh(self) -> contextlib.AbstractContextManager[None]:
        """Programs to be stored must not come from JAX's cache."""
        return contextlib.nullcontext() if self._stored is None else without_compilation_cache()

    def lower(self, name: str, lowerable: Lowerable) -> Any:
        """The lowered program, by JAX's `jax.stages.Lowered`. In `on_device`."""
        function, abstract, donated = lowerable
        program = jax.jit(named(function, name), donate_argnums=donated)
        # Python, so one at a time at best: in turn, XLA has work after the first program; side by
        # side, all threads end late and together
        with self._lowering, without_garbage_collection():
            return program.lower(*abstract)

    def compile(self, lowered: Any, options: Options, *, alone: bool = False) -> Any:
        """The executable, a `jax.stages.Compiled`. alone: nothing else uses the device meanwhile,
        so what XLA times is worth keeping for later processes."""
        kept = {} if self._stored is None else self._stored.choices(keep=alone)
        self._at_work.active = True
        try:
            with self._notice.compiling():
                return lowered.compile({**options, **kept})
        finally:
            self._at_work.active = False
