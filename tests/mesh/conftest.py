"""Tests of several devices: `make mesh-tests` makes eight of a CPU before JAX starts."""

from __future__ import annotations

import jax
import pytest

from jaxserve.step import shared

DEVICES = 8


def pytest_collection_modifyitems(items):
    there = len(jax.devices())
    for item in items:
        if item.path.parent.name == "mesh" and there < DEVICES:
            reason = f"needs {DEVICES} devices, not {there} (make mesh-tests)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Replicas of all engines of this process find each other's programs."""
    folder = shared.MemoryFolder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "MemoryFolder", lambda: folder)
        yield folder
