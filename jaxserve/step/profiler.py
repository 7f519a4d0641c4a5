"""Traces of the engine's steps, by JAX's profiler."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import jax

from jaxserve.errors import ProfileError

if TYPE_CHECKING:
    from jaxserve.api.profile import ProfileSpec

logger = logging.getLogger(__name__)
HOST_LEVEL = 2
"""JAX's own: the loop's phases, dispatches and transfers, but not every little thing."""


class Profiler:
    """At most one trace at a time. Not thread-safe: the engine thread calls it.

    active: a trace was asked for and has not ended; `stepped` is then to be called after each step.
    """

    def __init__(self) -> None:
        self.active = False
        self._spec: ProfileSpec | None = None
        self._tracing = False
        self._left: int | None = None

    def start(self, spec: ProfileSpec, steps: int) -> None:
        """Trace from now on, or from step `spec.first_step`; `steps` have been dispatched so far.

        Raises ProfileError if a profile runs already, here or elsewhere in the process.
        """
        if self._spec is not None:
            raise ProfileError(f"a profile is running already, into {self._spec.folder}")
        if steps >= spec.first_step:
            self._begin(spec)
        self._spec, self._left, self.active = spec, spec.steps, True

    def stop(self) -> None:
        """End the trace and write it; forget it if it has not begun. ProfileError: there is none,
        or it cannot be written."""
        if self._spec is None:
            raise ProfileError("no profile is running")
        self._end()

    def stepped(self, steps: int) -> None:
        """A step's results are read, and `steps` have been dispatched so far. Errors are logged:
        no caller waits here."""
        spec = self._spec
        assert spec is not None
        try:
            if not self._tracing:
                if steps >= spec.first_step:
                    self._begin(spec)
            elif self._left is not None:
                self._left -= 1
                if self._left == 0:
                    self._end()
        except ProfileError as error:
            self._spec, self.active = None, False
            logger.error("the profile ends without a trace: %s", error)

    def close(self) -> None:
        """End what runs: the engine stops."""
        if self._spec is None:
            return
        try:
            self._end()
        except ProfileError as error:
            logger.error("%s", error)

    def _begin(self, spec: ProfileSpec) -> None:
        options = jax.profiler.ProfileOptions()
        options.session_id = spec.name
        options.host_tracer_level = HOST_LEVEL if spec.host else 0
        options.python_tracer_level = int(spec.python)
        options.enable_hlo_proto = spec.hlo
        try:
            jax.profiler.start_trace(spec.folder, profiler_options=options)
        except Exception as error:
            raise ProfileError(f"JAX's profiler does not start: {error}") from error
        self._tracing = True

    def _end(self) -> None:
        assert self._spec is not None
        folder, tracing = self._spec.folder, self._tracing
        self._spec, self._tracing, self.active = None, False, False
        if not tracing:
            return
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            raise ProfileError(f"the profile cannot be written to {folder}: {error}") from error
        logger.info("a profile was written to %s", folder)
