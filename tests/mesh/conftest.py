"""Tests of several devices: `make mesh-tests` makes eight of a CPU before JAX starts. Those marked
gpu need two GPUs."""

from __future__ import annotations

import jax
import pytest

CPUS, GPUS = 8, 2


def pytest_collection_modifyitems(items):
    there = len(jax.devices())
    for item in items:
        wanted = GPUS if item.get_closest_marker("gpu") else CPUS
        if item.path.parent.name == "mesh" and there < wanted:
            reason = f"needs {wanted} devices, not {there} (make mesh-tests)"
            item.add_marker(pytest.mark.skip(reason=reason))
