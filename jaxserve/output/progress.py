"""One line a prefill step and one every few decode steps, in the words of SGLang's log. No jax."""

from __future__ import annotations

import logging

from jaxserve.output.stats import Stats
from jaxserve.packing.batch import Batch, DecodeBatch, ExtendBatch
from jaxserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class ProgressLog:
    """Logs at level INFO. Where that is off, a step costs a comparison or two.

    interval: decode steps from one line to the next.
    """

    def __init__(self, scheduler: Scheduler, stats: Stats, interval: int):
        self._scheduler = scheduler
        self._stats = stats
        self._interval = interval
        self._due = interval

    def dispatched(self, batch: Batch) -> None:
        """A step was queued on the device, and counted."""
        if not isinstance(batch, DecodeBatch):
            if logger.isEnabledFor(logging.INFO):
                self._extend(batch)
        elif self._stats.decode_steps >= self._due:
            self._due += self._interval
            if logger.isEnabledFor(logging.INFO):
                self._decode()

    def _extend(self, batch: ExtendBatch) -> None:
        first = [row for row in batch.rows if row.fresh]
        logger.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
            "#running-req: %d, #queue-req: %d",
            len(first),
            sum(row.stop - row.start for row in batch.rows if not row.carried),
            sum(row.sequence.request.cached_tokens for row in first),
            self._usage,
            self._running,
            len(self._scheduler.waiting),
        )

    def _decode(self) -> None:
        pages = self._scheduler.pages
        logger.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, "
            "gen throughput (token/s): %.2f, #queue-req: %d",
            self._running,
            (pages.num_pages - pages.available) * self._scheduler.page_size,
            self._usage,
            self._stats.throughput,
            len(self._scheduler.waiting),
        )

    @property
    def _running(self) -> int:
        return len(self._scheduler.live) - len(self._scheduler.waiting)

    @property
    def _usage(self) -> float:
        """Share of the pages in use."""
        pages = self._scheduler.pages
        return 1 - pages.available / pages.num_pages
