"""The measured numbers of a device kind: which table a device takes, and what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxserve
from jaxserve import machine
from jaxserve.machine import Crossovers, Dispatch, Pacing, machine_of
from jaxserve.packing.buckets import DECODE_ROWS

TABLES = Path(jaxserve.__file__).parent / "machines"


@pytest.fixture(autouse=True)
def unseen():
    """Nothing of this process has asked yet."""
    machine_of.cache_clear()
    yield
    machine_of.cache_clear()


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_the_numbers_of_an_h100(kind, caplog):
    caplog.set_level("DEBUG", logger="jaxserve")
    found = machine_of("gpu", kind)
    assert not caplog.records
    assert found.dispatch == Dispatch(1.2e-3, 0.8e-3, 3.0e12, 4)
    assert found.pacing == Pacing(1.3, 16384, None, 24, True)
    assert found.pacing.wave(32) == 512
    assert found.crossovers == Crossovers(64, 2048, 20 << 20, 16)
    assert found.memory is not None
    assert (found.memory.fraction, found.memory.fragmented) == (0.88, 0.02)
    defaults = found.defaults
    assert (defaults.page_size, defaults.rows, defaults.tokens) == (64, 512, 8192)
    assert (defaults.deterministic_rows, defaults.deterministic_tokens) == (64, 1024)
    assert defaults.decode_rows is not None and max(defaults.decode_rows) == defaults.rows
    assert defaults.table_bytes == 64 << 20


def test_the_numbers_of_a_cpu(caplog):
    caplog.set_level("DEBUG", logger="jaxserve")
    found = machine_of("cpu", "cpu")
    assert not caplog.records
    assert (found.dispatch, found.memory) == (None, None)
    assert found.crossovers == Crossovers(None, None, None, None)
    assert (found.pacing.wave(32), found.pacing.riders, found.pacing.rides) == (64, 24, False)
    defaults = found.defaults
    assert (defaults.page_size, defaults.rows, defaults.tokens) == (16, 32, 1024)
    assert (defaults.deterministic_rows, defaults.deterministic_tokens) == (32, 256)
    assert (defaults.decode_rows or DECODE_ROWS)[-1] == 512
    assert defaults.table_bytes == 16 << 20


def test_an_unknown_gpu_takes_those_of_an_h100_and_says_so_once(caplog):
    caplog.set_level("INFO", logger="jaxserve")
    found = [machine_of("gpu", "NVIDIA A100-SXM4-80GB") for _ in range(2)]
    assert found == [machine_of("gpu", "NVIDIA H100 80GB HBM3")] * 2
    [record] = caplog.records
    assert "NVIDIA A100-SXM4-80GB" in record.getMessage() and "H100" in record.getMessage()


def test_the_longest_name_wins(monkeypatch):
    [hopper] = [table for table in machine._tables() if table["platform"] == "gpu"]
    kinds = (["H100", "H200"], ["NVIDIA H200"], ["A100"])
    tables = [
        {**hopper, "device_kinds": names, "fallback": not at} for at, names in enumerate(kinds)
    ]
    for at, table in enumerate(tables):
        table["memory"] = {"fraction": at / 10, "fragmented": 0.0}
    monkeypatch.setattr(machine, "_tables", lambda: tables[::-1])
    kinds = ("NVIDIA H100", "NVIDIA H200", "NVIDIA A100", "NVIDIA B200")
    fractions = [memory.fraction for kind in kinds if (memory := machine_of("gpu", kind).memory)]
    assert fractions == [0.0, 0.1, 0.2, 0.0]


def test_one_fallback_a_platform_and_the_origin_of_all_numbers():
    tables = [json.loads(path.read_text()) for path in TABLES.glob("*.json")]
    assert sorted(table["platform"] for table in tables if table["fallback"]) == ["cpu", "gpu"]
    assert all(table["measured"] and table["device_kinds"] for table in tables)
