"""The parts of a running engine that tests look into or break. Who moves one changes this file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from jaxserve.engine import Engine
    from jaxserve.grammars.grammars import Grammars
    from jaxserve.inbox import Inbox
    from jaxserve.loop import EngineLoop
    from jaxserve.scheduler.scheduler import Scheduler
    from jaxserve.step.runner import Runner

T = TypeVar("T")


def loop(engine: Engine) -> EngineLoop:
    """Of an engine with a model; tests.api_fakes has others."""
    return engine._loop  # pyright: ignore[reportReturnType]


def runner(engine: Engine) -> Runner:
    """What runs its steps."""
    return loop(engine)._runner


def scheduler(engine: Engine) -> Scheduler:
    """With its slots and pages."""
    return loop(engine)._scheduler


def grammars(engine: Engine) -> Grammars:
    """What its calls compile grammars with."""
    return engine._builder._grammars


def inbox(engine: Engine) -> Inbox:
    """Where tasks for its thread are put."""
    return loop(engine)._inbox


def thread(engine: Engine) -> threading.Thread:
    """The engine thread."""
    return loop(engine)._thread


def call(engine: Engine, function: Callable[[], T]) -> T:
    """`function()` on the engine thread, between two steps."""
    return loop(engine).call(function)


def replicas(engine: Engine) -> list[EngineLoop]:
    """The loops of an engine with dp_size > 1."""
    return [replica.loop for replica in engine._loop._replicas]  # pyright: ignore
