"""Tests of several devices: `make mesh-tests` makes eight of a CPU before JAX starts. Those marked
gpu need two GPUs."""

from __future__ import annotations

import jax
import pytest

import jaxserve
from tests.mesh.cases import CASES, FAMILIES, HEADS, OPTIONS

CPUS, GPUS = 8, 2


def pytest_collection_modifyitems(items):
    there = len(jax.devices())
    for item in items:
        wanted = GPUS if item.get_closest_marker("gpu") else CPUS
        if item.path.parent.name == "mesh" and there < wanted:
            reason = f"needs {wanted} devices, not {there} (make mesh-tests)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def folder(tiny_models):
    return lambda family: tiny_models(family, **HEADS | FAMILIES.get(family, {}))


@pytest.fixture(scope="module")
def expected(folder):
    """What one device makes of some cases, by family."""
    found = {}

    def of(family, names):
        missing = [name for name in names if (family, name) not in found]
        if missing:
            with jaxserve.Engine(folder(family), **OPTIONS) as engine:
                for name in missing:
                    found[family, name] = engine.generate(**CASES[name])
        return [found[family, name] for name in names]

    return of
