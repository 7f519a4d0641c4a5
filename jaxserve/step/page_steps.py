"""Copies of pages, within the pool and to the host and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxserve.cache.host import Copies, scatter_targets
from jaxserve.cache.host_pool import COPYING_BYTES, HostPool
from jaxserve.step.memory import Memory
from jaxserve.step.pages import COPY_WIDTH


class PageSteps:
    """Queues them, between the steps that write and read the pages."""

    def __init__(
        self, memory: Memory, host: HostPool | None, run: Callable[..., Any], arrays: dict[str, Any]
    ) -> None:
        """host: of the host tier; None: there is none. run, arrays: the runner's."""
        self._memory, self._host = memory, host
        self._run, self._arrays = run, arrays

    def fork(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Pages to others of the pool: (source, destination)."""
        for start in range(0, len(copies), COPY_WIDTH):
            some = copies[start : start + COPY_WIDTH]
            sources = np.zeros(COPY_WIDTH, np.int32)
            targets = np.full(COPY_WIDTH, self._memory.num_pages, np.int32)
            sources[: len(some)], targets[: len(some)] = zip(*some, strict=True)
            self._run(("copy_pages", COPY_WIDTH), sources=sources, targets=targets)

    def copy(self, copies: Copies) -> None:
        """Pages to the host and back, before the next step: the device reads what is evicted before
        anybody writes there. With a host tier only."""
        host = self._host
        assert host is not None
        width = self._memory.block_pages
        for block, evicted in copies.out:
            pages = np.zeros(width, np.int32)
            pages[: len(evicted)] = evicted
            host.store(block, self._run(("gather_pages", width), pages=pages))
        at_once = max(COPYING_BYTES // host.block_bytes, 1)
        for number, (block, wanted) in enumerate(copies.into, 1):
            content = host.load(block)
            for pages in scatter_targets(wanted, width, self._memory.num_pages):
                self._run(("scatter_pages", width), pages=pages, content=content)
            if number % at_once == 0:  # what was copied lies there twice until it is written
                jax.block_until_ready(self._arrays["cache"].k)
