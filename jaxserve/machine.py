"""What the engine assumes of the device that it runs on. No jax.

Measured numbers are data: one JSON file a family of devices in `machines/`. A file names the kinds
of devices that it was measured on; a device takes the file with the longest name that its kind
contains, and else its platform's fallback: for GPUs that nobody measured, the numbers of an H100.
They decide speed and default sizes, never results. (Sizes of kernels have tables of their own, in
`pallas_kernels/tuning`.)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import logging
from typing import Any

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Defaults:
    """Sizes of an engine whose options leave them open."""

    page_size: int
    """Tokens."""
    rows: int
    """Requests that run at once. On a GPU no more than the largest decode bucket."""
    tokens: int
    """Of the largest extend step."""
    deterministic_rows: int
    """Of the one decode bucket of deterministic inference, where every step costs as much as a full
    one."""
    deterministic_tokens: int
    """Of its one extend bucket."""
    decode_rows: tuple[int, ...] | None
    """The ladder of decode buckets; None: `buckets.DECODE_ROWS`. A GPU reads all weights for a few
    rows in the time that it computes some 250: further rows of padding cost little below, and as
    much as any other above."""
    table_bytes: int
    """Of all page tables; a context that needs more is cut, as by a pool that has fewer pages."""


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatch:
    """What decides how many decode steps one program should have."""

    seconds: float
    """That queueing a program costs the host at most (0.65-1.2 ms)."""
    further: float
    """The same for each device more that the program runs on."""
    read_bandwidth: float
    """Bytes/s at which a decode step reads the weights."""
    most_steps: int
    """Unless the user asks for more: tokens arrive that many at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pacing:
    """What prompts cost those who run beside them, see `scheduler.pace`."""

    attention_slowness: float
    """Seconds a FLOP in attention, over those in products (H100: 510 and 670 TFLOP/s)."""
    wave_rows: int | None
    """Query rows (tokens x heads) that the attention kernel works on at once: 128 for each of an
    H100's 132 multiprocessors. Fewer take as long."""
    wave_tokens: int | None
    """The same where it does not depend on the heads: tokens in a tile of the CPU's kernel."""
    riders: int
    """Most running requests in an extend step. Each takes 8 packed tokens of it, a decode step of
    their own reads all weights: an H100 would draw level at about 28."""
    rides: bool
    """Whether riding is faster than a decode step. On a CPU a rider's token costs a whole tile."""

    def wave(self, heads: int) -> int:
        """Tokens that the attention kernel works on at once, with `heads` query heads."""
        if self.wave_tokens is not None:
            return self.wave_tokens
        assert self.wave_rows is not None
        return self.wave_rows // heads


@dataclasses.dataclass(frozen=True, slots=True)
class Crossovers:
    """Sizes at which another way to compute becomes the faster one; None: it never does. They
    change programs."""

    cublas_rows: int | None
    """Products of so many rows are left to cuBLAS. XLA's own kernels for them, chosen by timing
    each alone, win with few rows: a step of one row took 0.70 ms (0.5B) and 5.7 ms (8B), with
    cuBLAS alone 1.07 and 7.3; of 256 rows 2.3 against 2.05 and 14.1 against 14.0 (H100). They are
    also part of the compile time."""
    cublas_rows_quantized: int | None
    """The same where kernels are int8 or float8: for cuBLAS they are first written out in 16 bits,
    which XLA's own kernels do on the way. A step of 256 rows took 22.8 ms with cuBLAS and 16.8
    without, the first token of 128 tokens 17.9 and 7.6; of 8,192 tokens XLA itself chose cuBLAS
    (8B, fp8, H100)."""
    transposed_bytes: int | None
    """Kernels of fewer bytes, and all of one byte an element, are kept transposed (`weights`)."""
    summed_rows: int | None
    """From so many rows on, a residual sum is made with the next norm; below, XLA makes both parts
    of the products around them."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of a device that has its own, see `cache.pool`."""

    fraction: float
    """For weights and KV pages, unless mem_fraction_static says."""
    fragmented: float
    """Share of what JAX may take that lies in pieces between larger arrays: a program's temporaries
    are one piece. A step of 100,000 tokens (8.9 GiB) beside a pool of all the rest did not fit
    (H100)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """One kind of device."""

    platform: str
    """"cpu", or what JAX calls its GPUs."""
    defaults: Defaults
    pacing: Pacing
    crossovers: Crossovers
    dispatch: Dispatch | None
    """None: programs cost the host nothing to queue that could be saved."""
    memory: DeviceMemory | None
    """None: it shares the host's."""

    @property
    def is_gpu(self) -> bool:
        return self.platform != "cpu"


@functools.cache
def machine_of(platform: str, device_kind: str) -> Machine:
    """Of a JAX device's `platform` and `device_kind`. Says once, in the log, where a GPU's numbers
    are another one's."""
    family = "cpu" if platform == "cpu" else "gpu"
    tables = [table for table in _tables() if table["platform"] == family]
    table = max(tables, key=lambda table: (_score(table, device_kind), table["fallback"]))
    if not _score(table, device_kind):
        logger.info(
            "%s has no table of measured numbers: those of %s are used",
            device_kind,
            table["measured"],
        )
    defaults, dispatch, memory = dict(table["defaults"]), table["dispatch"], table["memory"]
    if defaults["decode_rows"] is not None:
        defaults["decode_rows"] = tuple(defaults["decode_rows"])
    return Machine(
        platform,
        Defaults(**defaults),
        Pacing(**table["pacing"]),
        Crossovers(**table["crossovers"]),
        None if dispatch is None else Dispatch(**dispatch),
        None if memory is None else DeviceMemory(**memory),
    )


def _tables() -> list[dict[str, Any]]:
    folder = importlib.resources.files("jaxserve").joinpath("machines")
    files = (entry for entry in folder.iterdir() if entry.name.endswith(".json"))
    return [json.loads(entry.read_text(encoding="utf-8")) for entry in files]


def _score(table: dict[str, Any], device_kind: str) -> int:
    """Characters of the longest name in the table that the kind contains; 0 is none."""
    return max(len(name) if name in device_kind else 0 for name in table["device_kinds"])
