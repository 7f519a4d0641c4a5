"""The engine thread: admit -> schedule -> prepare -> dispatch -> commit, over and over.

Callers put tasks into an inbox from any thread and wait on their mailboxes. One thread owns the
scheduler and the device. It keeps one step in flight while it schedules the next (unless overlap is
off), so results are read one step late; what a stopped request still drew is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxserve.apart import Apart
from jaxserve.cache.host import HostPages
from jaxserve.cache.pages import PageAllocator
from jaxserve.cache.window import Window
from jaxserve.compat import Settings
from jaxserve.config import EngineConfig, Limits
from jaxserve.errors import EngineShutdownError, RequestFailedError
from jaxserve.lab.bench import Bench
from jaxserve.leftovers import Nobody, Owner, collect_left
from jaxserve.machine import machine_of
from jaxserve.output.commit import commit, fail
from jaxserve.output.counters import collect
from jaxserve.output.ends import Ends
from jaxserve.output.progress import ProgressLog
from jaxserve.output.stats import Stats
from jaxserve.packing.batch import Batch
from jaxserve.parallel.mesh import bytes_on_each, first_device
from jaxserve.parallel.peers import PeersError
from jaxserve.process import Home, abandon
from jaxserve.reception import Reception
from jaxserve.request import Request
from jaxserve.scheduler.queue_limit import QueueLimit
from jaxserve.scheduler.scheduler import DrainNeeded, Scheduler
from jaxserve.scheduler.scheduling import Scheduling
from jaxserve.step.guided import Between
from jaxserve.step.profiler import Profiler
from jaxserve.step.result import StepResult
from jaxserve.step.runner import Runner, phase

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from converters import LoadedModel
    from jaxserve.api.profile import ProfileSpec
    from jaxserve.config.media import Pictures
    from jaxserve.server_args import ServerArgs
    from jaxserve.step.shared import Shared

logger = logging.getLogger(__name__)
MOST_FAILURES = 2
"""Failed steps, with no sampled token in between, after which the engine gives up."""
SUSPICIOUS_SECONDS = 1.5
"""Of waiting for a step: half of what a device takes to give another one up."""


class EngineLoop(Reception):
    """A `core.Core` that runs requests on one engine thread. All public methods are thread-safe. In
    a process forked from this one they raise ForkedProcessError; `shutdown` and aborts have nothing
    to do there."""

    def __init__(self, config: EngineConfig, runner: Runner, owner: Owner | None = None):
        """owner: hears of each request that ends, and of the end; None: nobody needs to."""
        self.config = config
        self.startup_seconds = 0.0
        self._runner = runner
        self.chains = runner.chains
        self._stats = Stats()
        self._window = Window.fitting(
            runner.model_config.window,
            config.program.page_size,
            runner.num_pages,
            config.chunk_alignment,
        )
        host = runner.host
        self._host = None if host is None else HostPages(host.num_blocks, host.width)
        scheduler = Scheduler(
            Scheduling.of(config),
            PageAllocator(runner.num_pages),
            window=self._window,
            host=self._host,
            ready=lambda: runner.ready,
            on_finish=self._ended,
        )
        super().__init__(scheduler, QueueLimit(config.max_queued, config.policy.priorities))
        self.bench = Bench(self, runner, scheduler.pages, self._host)
        self._owner = owner or Nobody()
        self._progress = ProgressLog(self._scheduler, self._stats, config.log_interval)
        self._profiler = Profiler()
        self._in_flight: deque[StepResult] = deque()
        self._ends = Ends(runner.pick_ends)
        self._depth = 1 if config.overlap else 0
        self._failures = 0
        self._caught_up = 0.0
        runner.chains.guides.between = Between(self._catch_up, partial(fail, scheduler=scheduler))
        self._home = Home()
        self._settings = Settings.here()
        run = self._settings.applied()(self._serve)
        self._thread = threading.Thread(target=run, name="jaxserve-engine", daemon=True)

    @classmethod
    def start(
        cls,
        args: ServerArgs,
        loaded: LoadedModel,
        mesh: Mesh,
        pictures: Pictures | None = None,
        shared: Shared | None = None,
        owner: Owner | None = None,
    ) -> EngineLoop:
        """Build an engine around a model whose parameters lie on `mesh`, compile what is to be
        compiled beforehand, and start its thread. pictures: in prompts. shared: of replicas."""
        started = time.perf_counter()
        device, weights = first_device(mesh), bytes_on_each(loaded.params.values())
        kind = machine_of(device.platform, device.device_kind)
        config = EngineConfig.resolve(args, loaded.config, kind, weights, pictures)
        loop = cls(config, Runner(config, loaded, mesh, shared), owner)
        loop.limits.log_cut(asked=config.max_total_tokens is not None)
        return loop._begin(started)

    @classmethod
    def beside(
        cls, first: EngineLoop, loaded: LoadedModel, mesh: Mesh, shared: Shared, owner: Owner
    ) -> EngineLoop:
        """Another replica of `first`'s model on `mesh`: the same sizes, so the same programs."""
        config = dataclasses.replace(first.config, num_pages=first._runner.num_pages)
        started = time.perf_counter()
        return cls(config, Runner(config, loaded, mesh, shared), owner)._begin(started)

    def _begin(self, started: float) -> EngineLoop:
        self._thread.start()
        self.startup_seconds = time.perf_counter() - started
        return self

    @property
    def limits(self) -> Limits:
        """What one request may ask for."""
        runner = self._runner
        most = runner.num_pages if self._window is None else runner.config.program.table_width
        return Limits.of(self.config, runner.model_config, most)

    @property
    def most_cached_tokens(self) -> int:
        """That the prefix cache and host memory can hold; 0 without."""
        if self.config.radix_eviction is None:
            return 0
        pages = self._runner.num_pages
        if self._host is not None:
            pages += self._host.num_blocks * self._host.width
        return pages * self.config.program.page_size

    # -- from any thread --------------------------------------------------------------------------

    def flush_cache(self) -> bool:
        """Forget cached prefixes. False: requests are queued or running, so they are kept."""
        return self.ask_flush().result()

    def ask_flush(self) -> Future[bool]:
        """`flush_cache` that does not wait."""

        def run() -> bool:
            if self._scheduler.idle:
                self._scheduler.forget_prefixes()
            return self._scheduler.idle

        return self.ask(run)

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, see docs/api.md."""
        return self.ask_stats().result()

    def ask_stats(self) -> Future[dict[str, Any]]:
        """`stats` that does not wait."""
        return self.ask(self._collect_stats)

    @property
    def apart(self) -> Apart:
        """See `Core.apart`."""
        return Apart([self])

    def start_profile(self, spec: ProfileSpec) -> None:
        """Trace from the next step on. ProfileError: a profile runs already."""
        self.call(lambda: self._profiler.start(spec, self._stats.steps))

    def stop_profile(self) -> None:
        """End the trace and write it; steps wait for that. ProfileError: there is none."""
        self.call(self._profiler.stop)

    def close(self) -> None:
        """Let the thread stop; `shutdown` waits for it."""
        if not self._home.left:
            self._inbox.close(EngineShutdownError("the engine was shut down"))

    def shutdown(self) -> None:
        """Stop the thread, fail waiting requests with EngineShutdownError, free device memory."""
        if self._home.left:
            abandon(self)
            return
        self.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the engine thread ------------------------------------------------------------------------

    def _serve(self) -> None:
        self._runner.programs.watch_this_thread()
        try:
            while self._admit():
                try:
                    self._step()
                except Exception as error:
                    self._recover(error)
        except BaseException as error:
            logger.exception("the engine thread failed")
            self._inbox.close(error)
        self._stop()

    def _step(self) -> None:
        """Queue the next step on the device, and read the one before."""
        batch = self._schedule()
        if batch is not None:
            self._dispatch(batch)
        if self._in_flight and (batch is None or len(self._in_flight) > self._depth):
            self._commit()

    def _admit(self) -> bool:
        """Do what callers asked for; sleep while nothing runs. False: the engine is to stop."""
        while True:
            idle = self._scheduler.idle and not self._in_flight
            since = time.perf_counter()
            tasks = self._inbox.take(block=idle)
            if idle:
                self._failures = 0  # whatever failed before, its requests are gone
                self._stats.rested(time.perf_counter() - since)
            if tasks is None:
                return False
            for task in tasks:
                task.perform()
            if self._in_flight or not self._scheduler.idle:
                return True

    def _schedule(self) -> Batch | None:
        try:
            with self._phase("schedule"):
                batch = self._scheduler.schedule()
        except DrainNeeded:
            return None
        if batch is None and not self._in_flight and not self._scheduler.idle:
            raise RuntimeError("the scheduler holds requests but can run none of them")
        return batch

    def _dispatch(self, batch: Batch) -> None:
        try:
            with self._phase("prepare"):
                prepared = self._runner.prepare(batch)
        except Exception as error:
            logger.exception("a batch could not be prepared; its requests fail")
            for sequence in batch.sequences:
                failure = RequestFailedError.caused_by(error)
                fail(sequence.request, failure, self._scheduler)
            self._scheduler.forget_prefixes()  # some were to be computed by this batch
            return
        with self._phase("dispatch"):
            if self._host is not None:
                self._runner.pages.copy(self._host.take())
            self._in_flight.append(self._runner.dispatch(prepared))
        self._stats.dispatched(batch)
        self._progress.dispatched(batch)

    def _commit(self) -> None:
        result = self._in_flight.popleft()
        since = time.perf_counter()
        with phase("wait"):
            result.wait()
        if time.perf_counter() - since > SUSPICIOUS_SECONDS:
            self._runner.check_peers()
        self._ends.hand_out()
        with self._phase("commit"):
            kept = commit(result, self._scheduler, self._ends.of(result))
            self._ends.gather()
        if not self._in_flight:
            self._ends.hand_out()
        if result.batch.samples:  # a prompt may fail at its second part again and again
            self._failures = 0
        self._stats.committed(kept)
        if self._profiler.active:
            self._profiler.stepped(self._stats.steps)

    def _catch_up(self) -> None:
        started = time.perf_counter()
        while self._in_flight:
            self._commit()
        self._caught_up += time.perf_counter() - started

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Names the block in a trace, and counts its time but for compilations and `_catch_up`."""
        programs, since = self._runner.programs, time.perf_counter()
        since -= programs.engine_seconds + self._caught_up
        with phase(name):
            yield
        now = time.perf_counter() - programs.engine_seconds - self._caught_up
        self._stats.spent(name, now - since)

    def _recover(self, error: Exception) -> None:
        """A step failed: on the device, which loses the donated cache, or amid the host's books.
        Start both over, recompute every admitted request; give up when that fails again at once."""
        self._ends.hand_out()
        self._failures += 1
        if self._failures >= MOST_FAILURES or isinstance(error, PeersError):
            raise error
        logger.error("a step failed, its requests are recomputed", exc_info=error)
        self._in_flight.clear()
        self._scheduler.retract_all()
        self._runner.reset()
        self.bench.lost()

    def _ended(self, request: Request) -> None:
        self._stats.ended(request)
        self._owner.ended(request)

    def _stop(self) -> None:
        """Leave everybody still waiting to the owner, then let go of the device."""
        self._ends.hand_out()
        left = self._left
        left.reason = self._inbox.close(EngineShutdownError("the engine was shut down"))
        left.requests[:0] = collect_left(self._scheduler.live)
        with contextlib.suppress(Exception):  # of whatever part has failed
            left.counters = self._collect_stats()
        self._owner.stopped(left)
        left.requests.clear()
        self._scheduler.live.clear()
        self._in_flight.clear()
        self._profiler.close()
        self._runner.close()

    def _collect_stats(self) -> dict[str, Any]:
        return collect(self._scheduler, self._runner, self._stats, self._host) | {
            "context_length": self.limits.longest,
            "startup_time": self.startup_seconds,
        }
