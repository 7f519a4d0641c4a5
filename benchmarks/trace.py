"""Reading a profiler's trace: kernels on the device, named phases of the host."""

from __future__ import annotations

import glob
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

IDLE_NS = 1e6
"""A device that did nothing for this long has begun a new run."""


class Kernel(NamedTuple):
    """start, end: nanoseconds. program: the compiled module's name, "" for copies."""

    name: str
    program: str
    start: float
    end: float


def planes(folder: str) -> Iterator[Any]:
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        yield from jax.profiler.ProfileData.from_file(path).planes


def kernels(folder: str, device: str = "/device:GPU") -> list[Kernel]:
    """Everything that ran on GPUs whose planes are named `device`..., in order of its start."""
    found = []
    for plane in planes(folder):
        if not plane.name.startswith(device):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    with warnings.catch_warnings():  # of the profiler's own types (jax 0.11)
                        warnings.simplefilter("ignore", DeprecationWarning)
                        program = str(dict(event.stats).get("hlo_module", ""))
                    start = event.start_ns
                    found.append(Kernel(event.name, program, start, start + event.duration_ns))
    return sorted(found, key=lambda kernel: kernel.start)


def host_events(folder: str) -> list[tuple[str, str, list[float]]]:
    """(thread, event, nanoseconds of each occurrence) of what JAX's C++ code and XLA name, the
    longest in all first."""
    found: dict[tuple[str, str], list[float]] = {}
    for plane in planes(folder):
        if plane.name.startswith("/host"):
            for line in plane.lines:
                for event in line.events:
                    found.setdefault((line.name, event.name), []).append(event.duration_ns)
    return sorted(((*key, times) for key, times in found.items()), key=lambda each: -sum(each[2]))


def phases(
    events: list[tuple[str, str, list[float]]], names: tuple[str, ...]
) -> dict[str, list[float]]:
    """Nanoseconds of each occurrence of the named phases, on whichever thread."""
    found: dict[str, list[float]] = {}
    for _, name, times in events:
        if name in names:
            found.setdefault(name, []).extend(times)
    return found


def runs(found: list[Kernel]) -> list[list[Kernel]]:
    """Kernels of each run, where runs are kept apart by idle time."""
    groups: list[list[Kernel]] = []
    end = float("-inf")
    for kernel in found:
        if kernel.start > end + IDLE_NS:
            groups.append([])
        groups[-1].append(kernel)
        end = max(end, kernel.end)
    return groups


def traced_seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """Device time of each of `rounds` runs, from the start of its first kernel to the end of its
    last: what the host needs to queue them is not in it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(rounds):
                jax.block_until_ready(run())
                time.sleep(3 * IDLE_NS / 1e9)
        groups = runs(kernels(folder))
    return [(max(k.end for k in group) - group[0].start) / 1e9 for group in groups]
