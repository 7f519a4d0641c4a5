"""What stands behind an engine: the one contract between calls and whatever runs them. No jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from jaxserve.apart import Apart
    from jaxserve.api.profile import ProfileSpec
    from jaxserve.config import Limits
    from jaxserve.request import Request


class Core(Protocol):
    """Runs requests. `Engine` and its calls use nothing else of it, from any thread; requests hear
    of everything through their mailboxes. `loop.EngineLoop` is one, on one device."""

    @property
    def limits(self) -> Limits:
        """What one request may ask for."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none, and set their `submitted_time`. Does not wait for them.
        EngineDeadError, EngineShutdownError: it is gone. InvalidRequestError: too many wait."""
        ...

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """End requests whose id starts with `rid`, or all: their callers get what there is, with
        the reason "abort". Unknown ids and "" are ignored. Raises nothing, however it stands."""
        ...

    def abort_requests(self, requests: Sequence[Request]) -> None:
        """End exactly these requests, if they still run. Raises nothing; may be called while the
        collector runs, and by a signal handler."""
        ...

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False, and nothing is forgotten, while requests are queued or
        running. EngineDeadError, EngineShutdownError."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, see docs/api.md. EngineDeadError, EngineShutdownError."""
        ...

    @property
    def apart(self) -> Apart:
        """Of requests that are drawn apart. EngineDeadError, EngineShutdownError: it is gone."""
        ...

    def start_profile(self, spec: ProfileSpec) -> None:
        """Trace from the next step on. ProfileError: a profile runs already."""
        ...

    def stop_profile(self) -> None:
        """End the trace and write it. ProfileError: there is none."""
        ...

    def shutdown(self) -> None:
        """Fail waiting requests with EngineShutdownError and free the device. May be called twice,
        and from any thread."""
        ...
