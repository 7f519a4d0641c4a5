"""Programs that were compiled beside requests get their kernels timed when there are none."""

from __future__ import annotations

import logging
import time

from jaxserve.step.compile import Programs
from jaxserve.step.workers import Workers

logger = logging.getLogger(__name__)

REST_SECONDS = 1.0
"""Without any step, before something is timed: longer than a step, and than callers pause."""
LOOK_SECONDS = 0.2


def time_at_rest(programs: Programs) -> None:
    """On a thread of its own, when all programs are there: compile those again for which XLA has
    timed nothing, one at a time and only while no step is queued, until `programs` is closed.

    What products of 128 rows and more lose untimed is 1-3% (H100), too little to hold up an engine
    that starts, and too much to lose for ever.
    """
    Workers(_time, [programs], threads=1, stopped=programs.closed)


def _time(programs: Programs) -> None:
    while not programs.closed.wait(LOOK_SECONDS):
        resting = time.monotonic() - programs.used_at > REST_SECONDS
        if programs.compiling or not resting:
            continue
        try:
            if not programs.time_one():
                return
        except Exception:
            logger.exception("a program could not be timed; it serves as it is")
