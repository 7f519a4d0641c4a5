"""Tells whoever waits at a terminal that programs are being compiled."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxserve.bar import Bar

logger = logging.getLogger(__name__)
PATIENCE = 2.0
"""Seconds of compiling that need no words."""
FROM_CACHE = 0.5
"""Seconds a program may take out of JAX's compilation cache: those do not count."""
TICK = 0.25


class Notice:
    """One line on stderr, once, when an engine compiles for longer than a moment; where stderr is a
    terminal a progress bar, each time. Thread-safe.

    Nothing at log level "critical", nor where TQDM_DISABLE is set, as for other bars.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._spent = 0.0
        self._said = False

    @contextlib.contextmanager
    def shown(self, names: list[str]) -> Iterator[Callable[[], None]]:
        """While the block makes the programs `names`; it calls what this yields for each."""
        if not names or os.environ.get("TQDM_DISABLE") or not logger.isEnabledFor(logging.ERROR):
            yield lambda: None
            return
        ready: list[None] = []
        over = threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(names, ready, over), name="jaxserve-notice", daemon=True
        )
        watcher.start()
        try:
            yield lambda: ready.append(None)
        finally:
            over.set()
            watcher.join()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """While XLA compiles a program on this thread, or finds it in JAX's cache."""
        thread, started = threading.get_ident(), time.monotonic()
        with self._lock:
            self._running[thread] = started
        try:
            yield
        finally:
            with self._lock:
                del self._running[thread]
                self._spent += _counted(time.monotonic() - started)

    def _seconds(self) -> float:
        """Spent on compiling by this engine, so far."""
        with self._lock:
            longest = time.monotonic() - min(self._running.values(), default=time.monotonic())
            return self._spent + _counted(longest)

    def _watch(self, names: list[str], ready: list[None], over: threading.Event) -> None:
        while self._seconds() < PATIENCE:
            if over.wait(TICK):
                return
        if sys.stderr is None:
            return
        if not sys.stderr.isatty():
            self._say(names)
            return
        what = names[0] if len(names) == 1 else f"{len(names)} programs"
        layout = None if len(names) > 1 else "{desc} [{elapsed}]"
        with Bar(total=len(names), desc=f"Compiling {what}", bar_format=layout, leave=False) as bar:
            while not over.wait(TICK):
                bar.update(len(ready) - bar.n)
                bar.refresh()

    def _say(self, names: list[str]) -> None:
        if self._said:
            return
        self._said = True
        what = f"{len(names)} programs"
        if len(names) == 1:
            what = f"{names[0]}, and programs of other sizes when they are first used"
        kept = "compilation_cache_dir keeps them for later starts"
        print(f"jaxserve: compiling {what} ({kept})", file=sys.stderr, flush=True)


def _counted(seconds: float) -> float:
    return seconds if seconds > FROM_CACHE else 0.0
