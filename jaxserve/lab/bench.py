"""Where the laboratories of one engine loop get what they work with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from jaxserve import checks
from jaxserve.errors import (
    EngineDeadError,
    EngineShutdownError,
    InvalidRequestError,
    OutOfPagesError,
)
from jaxserve.lab.desk import Desk
from jaxserve.lab.lab import Lab
from jaxserve.lab.steps import LabSteps
from jaxserve.token_ids import token_ids

if TYPE_CHECKING:
    from jaxserve.cache.host import HostPages
    from jaxserve.cache.prefix import PrefixCache
    from jaxserve.loop import EngineLoop
    from jaxserve.step.runner import Runner

T = TypeVar("T")


class Bench:
    """Of one loop."""

    def __init__(
        self, loop: EngineLoop, runner: Runner, pool: PrefixCache, host: HostPages | None
    ) -> None:
        """pool, host: of the loop's scheduler."""
        self._loop, self._runner, self._pool, self._host = loop, runner, pool, host
        self.steps = LabSteps(
            runner.facts, runner.run, runner.pages.fork, lambda: runner.ready, runner.chains.compile
        )
        """What its laboratories compute with."""
        self._desks: list[Desk] = []

    @property
    def page_size(self) -> int:
        """S, tokens."""
        return self._runner.config.program.page_size

    # -- from any thread --------------------------------------------------------------------------

    def open(self, max_tokens: int) -> Lab:
        """Reserve pages for `max_tokens` tokens, and compile what is not there yet.
        InvalidRequestError: there cannot be as many. OutOfPagesError: others have them now."""
        count = -(-checks.integer("max_tokens", max_tokens, 1) // self.page_size)
        if self._runner.model_config.window is not None:
            raise InvalidRequestError(
                "engine.lab is not for models with a sliding window in all layers: their pages are "
                "taken over and over"
            )
        self.steps.build()
        return Lab(self, self.call(lambda: self._open(max_tokens, count)))

    def call(self, function: Callable[[], T]) -> T:
        """Its value, when the engine thread has run it between two steps."""
        return self._loop.call(function)

    def close(self, desk: Desk) -> None:
        """No more calls come for it. An engine that is gone has taken its pages along."""

        def run() -> None:
            if desk in self._desks:
                desk.close()
                self._desks.remove(desk)

        with contextlib.suppress(EngineShutdownError, EngineDeadError):
            self.call(run)

    def check_length(self, length: int) -> None:
        """InvalidRequestError: a handle of `length` tokens is longer than the context."""
        most = self._loop.limits.context_length
        if length > most:
            raise InvalidRequestError(
                f"a handle of {length} tokens is longer than context_length={most}"
            )

    def token_ids(self, name: str, values: Any) -> list[int]:
        """Ids within the vocabulary. InvalidRequestError."""
        return token_ids(name, values, self._runner.model_config.vocab_size)

    # -- on the engine thread ---------------------------------------------------------------------

    def lost(self) -> None:
        """The device has lost all pages, and nobody has taken any since."""
        for desk in self._desks:
            desk.lost()

    def _open(self, max_tokens: int, count: int) -> Desk:
        limits, pool = self._loop.limits, self._pool
        reserved = sum(desk.count for desk in self._desks)
        left = (pool.num_pages - reserved - count) * self.page_size
        if left < limits.longest:
            raise InvalidRequestError(
                f"max_tokens={max_tokens} leaves {max(left, 0)} tokens of the pool's "
                f"{pool.num_pages * self.page_size}, and a request may be {limits.longest} long: "
                "start the engine with more max_running_requests or max_total_tokens, or with less "
                "context_length"
            )
        if count > pool.available:
            raise OutOfPagesError(
                f"max_tokens={max_tokens} is more than the {pool.available * self.page_size} that "
                "running requests leave now"
            )
        unit = max(self.page_size, self._runner.config.chunk_alignment)
        desk = Desk(pool, self.steps, count, self.page_size, unit, self._save_evicted)
        self._desks.append(desk)
        return desk

    def _save_evicted(self) -> None:
        """Queue the copies to host memory of pages that change hands now."""
        if self._host is not None:
            self._runner.pages.copy(self._host.take())
