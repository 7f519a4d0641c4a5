"""The grammars that an engine has compiled, or is compiling, on threads of its own."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from jaxserve.grammars.compiler import Compiled

if TYPE_CHECKING:
    from jaxserve.sampling_params import Grammar

MOST_KEPT = 256
"""Grammars; the one that was asked for longest ago is forgotten first."""
MOST_THREADS = 4
"""That compile side by side; each ends when nothing is left to do."""
STACK = 512 << 20
"""Bytes of such a thread's, of which only those exist that are used. llguidance follows rules that
refer to rules by calling itself: 3,000 of them take 8 MiB, and what overflows ends the process."""


class Library:
    """Thread-safe. A grammar is compiled once, however many calls ask for it meanwhile, and goes on
    to be when they no longer wait: nothing can interrupt it."""

    def __init__(self, compile: Callable[[Grammar], Compiled]) -> None:
        self._compile = compile
        # Re-entrant: a signal handler may ask while its own thread does.
        self._lock = threading.RLock()
        self._known: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        self._waiting: deque[tuple[Grammar, Future[Compiled]]] = deque()
        self._working = 0
        self._most = min(MOST_THREADS, os.cpu_count() or 1)

    def ask(self, grammar: Grammar) -> Future[Compiled]:
        """The grammar, now or later."""
        with self._lock:
            future = self._known.get(grammar)
            if future is not None:
                self._known.move_to_end(grammar)
                return future
            if self._working < self._most:
                self._start()
            future = self._known[grammar] = Future()
            if len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
            self._waiting.append((grammar, future))
            return future

    def forget(self, grammar: Grammar) -> None:
        """Compile it anew when it is asked for again."""
        with self._lock:
            self._known.pop(grammar, None)

    def _start(self) -> None:
        """Another thread, which waits for the lock."""
        # of all threads that begin now, which costs the others nothing
        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=self._work, name="jaxserve-grammar").start()
        finally:
            threading.stack_size(usual)
        self._working += 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working -= 1
                    return
                grammar, future = self._waiting.popleft()
            try:
                future.set_result(self._compile(grammar))
            except BaseException as error:  # a panic of Rust code is no Exception
                self.forget(grammar)
                future.set_exception(error)
