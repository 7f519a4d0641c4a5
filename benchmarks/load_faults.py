"""Failures put into a running engine from outside, and what each is allowed to cost.

    host       preparing a batch raises: its requests fail, the others go on
    launch     queueing a step raises, nothing has been donated: everything is recomputed
    donated    a program raises after its arguments were donated: the same
    result     waiting for a step's tokens raises: the same
    pages      the page allocator raises OutOfPagesError: the same
    memory     the page allocator raises MemoryError: the same
    stops      decoding for stop strings raises on the engine thread: that request fails
    encode     the tokenizer raises in a call: that call fails
    decode     decoding raises on a caller's thread: that call fails

The engine knows nothing of them: they replace methods of its objects. Failures of steps come one at
a time, several steps apart, because a second one in a row ends the engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from typing import Any

import jaxserve
from jaxserve.cache.pages import OutOfPagesError
from tests import inside

STEP_KINDS = ("host", "launch", "donated", "result", "pages", "memory")
TEXT_KINDS = ("stops", "encode", "decode")
RAISED = {"pages": OutOfPagesError, "memory": MemoryError}


class InjectedError(Exception):
    """What fails where RAISED does not say otherwise."""


@dataclasses.dataclass
class Fault:
    """One failure. thread: that it was raised on. rids: the requests that it fails. recomputed,
    tokens: the requests that run again because of it, and how many tokens they had. seconds: until
    the next step was queued."""

    kind: str
    thread: int
    rids: frozenset[str] = frozenset()
    recomputed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed_calls: int = 0


class Faults:
    """Plans failures and counts what they cost.

    every: steps from one failed step to the next, on average; at least 20. text_rate: probability
    that an encoding or decoding fails.
    """

    def __init__(self, engine: jaxserve.Engine, every: int, text_rate: float, seed: int):
        if every < 20:
            raise ValueError(f"every must be at least 20, got {every}")
        self.injected: dict[int, Fault] = {}
        self.doomed: set[str] = set()
        """Requests that must fail, as long as nobody has heard so."""
        self._engine = engine
        self._every = every
        self._text_rate = text_rate
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._serials = itertools.count()
        self._kinds = itertools.cycle(STEP_KINDS)
        self._armed: str | None = None
        self._steps_left = every
        self._since: tuple[Fault, float] | None = None
        self._install()

    def costs(self) -> dict[str, dict[str, Any]]:
        """By kind: how often, calls failed, requests recomputed and their tokens, and the mean time
        until the next step was queued."""
        table: dict[str, dict[str, Any]] = {}
        for kind in (*STEP_KINDS, *TEXT_KINDS):
            faults = [fault for fault in self.injected.values() if fault.kind == kind]
            table[kind] = {
                "injected": len(faults),
                "failed_calls": sum(fault.failed_calls for fault in faults),
                "recomputed_requests": sum(fault.recomputed for fault in faults),
                "recomputed_tokens": sum(fault.tokens for fault in faults),
            }
            if kind in STEP_KINDS:
                seconds = sum(fault.seconds for fault in faults) / max(len(faults), 1)
                table[kind]["ms_to_next_step"] = round(1e3 * seconds, 2)
        return table

    def blame(self, error: BaseException) -> Fault | None:
        """The failure that `error`, or its cause, was raised by."""
        text = str(error.__cause__ or error)
        if not text.startswith("injected #"):
            return None
        return self.injected[int(text.removeprefix("injected #"))]

    def _raise(self, kind: str, requests: Any = (), recomputes: bool = False) -> None:
        fault = Fault(kind, threading.get_ident())
        if recomputes:
            admitted = [s for s in inside.scheduler(self._engine).live.values() if s.admitted]
            fault.recomputed = len(admitted)
            fault.tokens = sum(s.total_tokens for s in admitted)
        fault.rids = frozenset(request.rid for request in requests)
        with self._lock:
            serial = next(self._serials)
            self.injected[serial] = fault
            self.doomed |= fault.rids
            if kind in STEP_KINDS:
                self._armed = None
                self._steps_left = self._random.randint(self._every // 2, self._every * 3 // 2)
                self._since = fault, time.perf_counter()
        raise RAISED.get(kind, InjectedError)(f"injected #{serial}")

    def _stepped(self) -> None:
        """A step is queued."""
        if self._since is not None:
            fault, since = self._since
            fault.seconds = time.perf_counter() - since
            self._since = None
        self._steps_left -= 1
        if self._steps_left == 0:
            self._armed = next(self._kinds)

    # -- the engine's objects ---------------------------------------------------------------------

    def _install(self) -> None:
        runner, pages = inside.runner(self._engine), inside.scheduler(self._engine).pages
        prepare, dispatch, allocate = runner.prepare, runner.dispatch, pages.allocate

        def failing_prepare(batch: Any) -> Any:
            if self._armed == "host":
                self._raise("host", [sequence.request for sequence in batch.sequences])
            return prepare(batch)

        def failing_dispatch(prepared: Any) -> Any:
            if self._armed == "launch":
                self._raise("launch", recomputes=True)
            result = dispatch(prepared)
            if self._armed == "result":
                (part,) = result.parts
                return result._replace(parts=(part._replace(tokens=_FailingTokens(self)),))
            self._stepped()
            return result

        def failing_allocate(count: int) -> list[int]:
            if self._armed in ("pages", "memory"):
                self._raise(self._armed, recomputes=True)
            return allocate(count)

        runner.prepare, runner.dispatch = failing_prepare, failing_dispatch
        runner.programs = _FailingPrograms(runner.programs, self)  # type: ignore[assignment]
        pages.allocate = failing_allocate
        codec = self._engine._codec
        assert codec is not None
        codec._backend = _FailingTokenizer(codec._backend, self)

    def step_fails(self, kind: str) -> None:
        """Raises if it is the turn of `kind`."""
        if self._armed == kind:
            self._raise(kind, recomputes=True)

    def text_fails(self, kind: str) -> None:
        """Raises now and then."""
        if self._random.random() < self._text_rate:
            engine_thread = threading.current_thread() is inside.thread(self._engine)
            self._raise("stops" if engine_thread else kind)


class _FailingTokens:
    def __init__(self, faults: Faults):
        self._faults = faults

    def __array__(self, *args: Any, **options: Any) -> None:
        self._faults.step_fails("result")


class _FailingPrograms:
    """runner.programs, whose steps may raise when they have taken their arguments."""

    def __init__(self, programs: Any, faults: Faults):
        self._programs = programs
        self._faults = faults

    def program(self, key: Any) -> Any:
        real = self._programs.program(key)

        def run(*args: Any) -> Any:
            outputs = real(*args)
            self._faults.step_fails("donated")
            return outputs

        return run

    def __len__(self) -> int:
        return len(self._programs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)


class _FailingTokenizer:
    """The backend of a Codec."""

    def __init__(self, backend: Any, faults: Faults):
        self._backend = backend
        self._faults = faults

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        self._faults.text_fails("encode")
        return self._backend.encode(texts, special)

    def decode(self, ids: list[int], skip: bool, spaces: bool) -> str:
        self._faults.text_fails("decode")
        return self._backend.decode(ids, skip, spaces)
