"""Which programs are compiled when: an engine answers as soon as a few are there."""

from __future__ import annotations

import os

from jaxserve.config import EngineConfig
from jaxserve.packing.buckets import Ready
from jaxserve.step.catalogue import Catalogue
from jaxserve.step.compile import Programs
from jaxserve.step.retiming import time_at_rest

FIRST_THREADS = 4
"""Compile what an engine begins with: XLA times kernels of one program at a time, badly where the
host is busy, and its own threads need cores (8B on 16 cores: 36 s with one thread, 24 with 4, 30
with 16)."""


class Precompilation:
    """Of one engine's programs: first those that can run anything, then, while requests run, the
    others, loaded or compiled. Where the engine is not to precompile, all of them on first use."""

    def __init__(self, config: EngineConfig, catalogue: Catalogue, programs: Programs) -> None:
        self._config = config
        self._catalogue = catalogue
        self._programs = programs
        self._ready = Ready.everything(config.buckets)
        self._counted = -1

    def first(self) -> None:
        """Load or compile what an engine cannot answer without: everything, if that is to be waited
        for. Else XLA makes its choices for what will be compiled later, too, but for what can wait
        until nothing runs. Nothing else uses the device, and its memory is free."""
        if not self._config.precompile:
            return
        catalogue, programs, threads = self._catalogue, self._programs, os.cpu_count() or 1
        everything = catalogue.beforehand()
        wait = self._config.wait_until_compiled
        first = everything if wait else catalogue.first()
        programs.load(first, threads, timed_only=wait)
        now = [key for key in first if key not in programs]
        later = set(everything).difference(first)
        later -= programs.stored(later)
        postponed = catalogue.postponed(later)
        programs.postpone(postponed)
        choices = catalogue.choices(later - postponed)
        few = threads if wait else min(threads, FIRST_THREADS)
        programs.build(catalogue.mosaic_first(now), few, choices)

    def rest(self) -> None:
        """Load or compile the others while requests run, on half of the cores. What XLA could not
        time meanwhile, it times when there are none."""
        if not self._config.precompile:
            return
        programs, catalogue = self._programs, self._catalogue
        programs.expect_no_more()
        later = [key for key in catalogue.beforehand() if key not in programs]
        programs.build_behind(catalogue.mosaic_first(later), max((os.cpu_count() or 1) // 2, 1))
        time_at_rest(programs)

    @property
    def ready(self) -> Ready:
        """What can run now."""
        count = len(self._programs)
        if self._config.precompile and count != self._counted:
            catalogue, programs = self._catalogue, self._programs
            buckets = self._config.buckets.only(
                catalogue.rungs("decode", programs), catalogue.rungs("extend", programs)
            )
            self._ready = Ready(buckets, catalogue.rungs("several", programs))
            self._counted = count
        return self._ready
