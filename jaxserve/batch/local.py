"""A job on this machine: one engine in this process, or a process for each of several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jaxserve.batch.answers import ENGINE_IS_GONE
from jaxserve.batch.job import GONE, Job, portable
from jaxserve.batch.tally import Tally
from jaxserve.errors import EngineDeadError, InvalidRequestError

MOST_RESTARTS = 3
"""Of the engines of one job together."""
SECONDS_TO_END = 2.0
"""For a process whose pipe is closed: then it is killed. It may be loading a model."""


def here(job: Job, numbers: Sequence[int]) -> Iterator[Tally]:
    """Does the parts in this process. Raises what the engine does; parts done stay done."""
    from jaxserve.engine import Engine  # JAX takes a second to import

    with (
        Engine(server_args=job.server_args) as engine,
        ThreadPoolExecutor(job.parts_in_flight) as threads,
    ):
        futures = [threads.submit(job.do, engine, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            engine.shutdown()  # whoever waits for it, in a thread, stops waiting
            raise


def devices(engines: int, each: int, dev: Path = Path("/dev")) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each engine: `each` of those that this process may use. Where there
    are none, engines run on the CPU. InvalidRequestError: there are some, and too few."""
    there = len([path for path in dev.glob("nvidia*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(there)]
    wanted = engines * each
    if there and len(names) < wanted:
        raise InvalidRequestError(
            f"dp_size={engines} engines of tp_size={each} need {wanted} GPUs, and there are "
            f"{len(names)}: {','.join(names)}"
        )
    return [",".join(names[n * each : (n + 1) * each]) for n in range(engines)]


def processes(job: Job, numbers: Sequence[int], engines: int) -> Iterator[Tally]:
    """Does the parts in `engines` processes. What a process that dies had not done goes to the
    others; it is started again, MOST_RESTARTS times in a job. Raises EngineDeadError beyond that,
    and what an engine's start raises."""
    queue, restarts = deque(numbers), 0
    on_cpu = job.server_args.device == "cpu"
    places = [""] * engines if on_cpu else devices(engines, job.server_args.tp_size)
    workers = [_Worker(job, gpus) for gpus in places]
    try:
        while queue or any(worker.doing for worker in workers):
            for worker in workers:
                worker.fill(queue)
            wait([worker.pipe for worker in workers])
            for place, worker in enumerate(workers):
                yield from worker.done()
                if worker.died:
                    queue.extendleft(sorted(worker.doing, reverse=True))
                    restarts += 1
                    if restarts > MOST_RESTARTS:
                        raise EngineDeadError(
                            f"{restarts} processes of engines died, the last with status "
                            f"{worker.end()}; the same command goes on where they stopped"
                        )
                    worker.end()
                    workers[place] = _Worker(job, worker.gpus)
    finally:
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.end()


class _Worker:
    """A process with an engine, and what it is doing."""

    def __init__(self, job: Job, gpus: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.gpus = gpus
        self.pipe, theirs = context.Pipe()
        self.doing: set[int] = set()
        self.died = False
        self._most = job.parts_in_flight
        self._process = context.Process(target=_work, args=(job, gpus, theirs), daemon=True)
        self._process.start()
        theirs.close()  # the process's end alone keeps the pipe open: its death closes it

    def fill(self, queue: deque[int]) -> None:
        """Gives it as many parts as it answers at a time."""
        try:
            while queue and len(self.doing) < self._most:
                self.pipe.send(queue[0])
                self.doing.add(queue.popleft())
        except OSError:
            self.died = True

    def done(self) -> Iterator[Tally]:
        """What it has done since the last time. Raises what it could not start for."""
        try:
            while self.pipe.poll():
                number, result = self.pipe.recv()
                if isinstance(result, Exception):
                    raise result
                self.doing.discard(number)
                yield result
        except (EOFError, ConnectionError):
            self.died = True

    def end(self) -> int | None:
        """Ends the process; its exit status. What it still does is not wanted."""
        self.pipe.close()
        self._process.join(SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _work(job: Job, gpus: str, pipe: Connection) -> None:
    """What a worker's process does, until its pipe is closed."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # JAX is not loaded yet
    lock = threading.Lock()

    def say(number: int, result: Tally | Exception) -> None:
        with lock:
            pipe.send((number, result))

    def tell(number: int, future: Future[Tally]) -> None:
        error: Any = future.exception()
        if isinstance(error, ENGINE_IS_GONE):
            os._exit(GONE)
        say(number, future.result() if error is None else portable(error))

    try:
        from jaxserve.engine import Engine

        engine = Engine(server_args=job.server_args)
    except Exception as error:
        say(-1, portable(error))
        return
    threads = ThreadPoolExecutor(job.parts_in_flight)
    try:
        while True:
            number: Any = pipe.recv()
            future = threads.submit(job.do, engine, number)
            future.add_done_callback(lambda future, number=number: tell(number, future))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        os._exit(0)  # whatever it still does: the job is over, or its parts begin anew
