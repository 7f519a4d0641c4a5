"""How much memory this process takes meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path


def anonymous_bytes() -> int:
    """Of this process, that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class PeakMemory:
    """Samples RssAnon while it is entered: `before`, and `bytes`, the growth to the peak."""

    def __init__(self, seconds: float = 0.005):
        """seconds: between two looks."""
        self._seconds = seconds

    def __enter__(self) -> PeakMemory:
        self.before = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.bytes = self._peak - self.before
