"""Which programs are compiled when: an engine answers as soon as a few are there."""

from __future__ import annotations

import os

from jaxserve.batch.buckets import Ready
from jaxserve.config import EngineConfig
from jaxserve.step.catalogue import Catalogue
from jaxserve.step.compile import Programs


class Precompilation:
    """Of one engine's programs: first those that can run anything, then, while requests run, the
    others. Where the engine is not to precompile, all of them on first use."""

    def __init__(self, config: EngineConfig, catalogue: Catalogue, programs: Programs) -> None:
        self._config = config
        self._catalogue = catalogue
        self._programs = programs
        self._ready = Ready.everything(config.buckets)
        self._counted = -1

    def first(self) -> None:
        """Load what is stored, compile what an engine cannot answer without, and have XLA make its
        choices for what comes later: nothing else uses the device, and its memory is free."""
        if not self._config.precompile:
            return
        catalogue, programs, threads = self._catalogue, self._programs, os.cpu_count() or 1
        everything, first = catalogue.beforehand(), catalogue.first()
        programs.load(everything, threads)
        choices = []
        if not self._config.wait_until_compiled:
            later = set(everything).difference(first)
            choices = catalogue.choices(key for key in later if key not in programs)
        programs.build(catalogue.mosaic_first(first), threads, sorted(choices))

    def rest(self) -> None:
        """All others; unless that is to be waited for, while requests run, on half of the cores."""
        if not self._config.precompile:
            return
        programs, cores = self._programs, os.cpu_count() or 1
        keys = self._catalogue.mosaic_first(self._catalogue.beforehand())
        if self._config.wait_until_compiled:
            programs.build(keys, cores)
        else:
            programs.build_behind(keys, max(cores // 2, 1))
        programs.expect_no_more()

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
