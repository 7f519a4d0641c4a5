"""How much memory there is, on the host and on a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def available_host_memory() -> int:
    """Bytes of memory the operating system would give to a new program."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(device: Any) -> int:
    """Bytes that JAX may take of `device`, a jax.Device, and has not; of a CPU the host's."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is None:
        return available_host_memory()
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
