"""Tuned sizes are data: one JSON file a family of devices, read once a call site traces.

A file names the device kinds it was measured on (a device matches the longest name that its kind
contains) and lists entries; the first whose `when` holds is used:

    {"operation": ..., "implementation": ..., "when": {"head_dim": 128}, "use": {"block": 64}}

A `when` value is a number, or [low, high] with both included. Sizes that no entry gives come from
the implementation's own defaults. `benchmarks/kernels.py --tune` writes such a file.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from pallas_kernels.device import Device


@functools.cache
def tables() -> tuple[dict[str, Any], ...]:
    """Every packaged table, by file name."""
    folder = importlib.resources.files(__name__)
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".json")),
        key=lambda entry: entry.name,
    )
    return tuple(json.loads(entry.read_text(encoding="utf-8")) for entry in files)


def _table(device: Device) -> dict[str, Any] | None:
    def score(table: dict[str, Any]) -> int:
        return max(len(kind) if kind in device.kind else 0 for kind in table["device_kinds"])

    best = max(tables(), key=score, default=None)
    return best if best is not None and score(best) else None


def _holds(when: dict[str, Any], features: dict[str, int]) -> bool:
    for name, wanted in when.items():
        low, high = wanted if isinstance(wanted, list) else (wanted, wanted)
        if not low <= features[name] <= high:
            return False
    return True


def tuned(
    device: Device, operation: str, implementation: str, features: dict[str, int]
) -> dict[str, int]:
    """Sizes measured best for `features` on `device`; empty when nothing was measured."""
    table = _table(device)
    for entry in table["entries"] if table else ():
        mine = (entry["operation"], entry["implementation"]) == (operation, implementation)
        if mine and _holds(entry.get("when", {}), features):
            return dict(entry["use"])
    return {}
