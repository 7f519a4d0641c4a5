"""Choosing an implementation: orders, refusals, tuned sizes."""

from __future__ import annotations

import functools
import importlib.resources
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import (
    Device,
    available_implementations,
    compat,
    decode_implementation,
    paged_decode,
    registry,
    tuning,
)  # fmt: skip
from pallas_kernels.paged_decode import cases
from pallas_kernels.registry import Implementation, Operation, cuda_only, sm90_only
from tests.kernels.support import ON_GPU, decode_shapes, module, quiet

CPU = Device("cpu", "cpu")
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
B200 = Device("gpu", "NVIDIA B200", (10, 0), 148)

IMPLEMENTATIONS = ("triton", "mosaic_sm90", "mosaic_cluster")


@pytest.mark.parametrize(
    ("operation", "device", "dtype", "order"),
    [
        ("paged_decode", CPU, np.float32, ("xla",)),
        ("paged_decode", H100, jnp.bfloat16, ("mosaic_cluster", "triton", "mosaic_sm90", "xla")),
        ("paged_decode", H100, np.float32, ("triton", "xla")),
        ("paged_decode", A100, jnp.bfloat16, ("triton", "xla")),
        ("paged_prefill", H100, np.float16, ("mosaic_sm90", "triton", "xla")),
        ("paged_prefill", B200, jnp.bfloat16, ("triton", "xla")),
        ("paged_prefill", CPU, jnp.bfloat16, ("xla",)),
        ("kv_write", H100, jnp.bfloat16, ("xla", "triton")),
        ("kv_write", CPU, np.float32, ("xla",)),
    ],
)
def test_default_orders(operation, device, dtype, order):
    assert available_implementations(operation, dtype, device) == order


def test_devices_that_cannot():
    assert cuda_only(H100) is None and cuda_only(A100) is None
    assert "cpu" in cuda_only(CPU)
    assert sm90_only(H100) is None
    assert "9.x" in sm90_only(A100) and "9.x" in sm90_only(B200) and "9.x" in sm90_only(CPU)


def arrays():
    case = cases.Case("small", 4, 2, 64, 16, (5, 20))
    return tuple(map(jnp.asarray, case.inputs(0, np.float32)))


@pytest.mark.skipif(ON_GPU, reason="checks the refusals of a CPU")
def test_falls_through_to_what_the_device_can():
    got = paged_decode(*arrays(), implementation=("triton", "mosaic_sm90", "xla"))
    np.testing.assert_array_equal(got, paged_decode(*arrays()))


@pytest.mark.skipif(ON_GPU, reason="checks the refusals of a CPU")
def test_all_reasons_when_none_fits():
    with pytest.raises(NotImplementedError) as caught:
        paged_decode(*arrays(), implementation=["triton", "mosaic_sm90"])
    assert "triton: needs a CUDA device" in str(caught.value)
    assert "mosaic_sm90: needs compute capability 9.x" in str(caught.value)


def test_unknown_names():
    known = "triton, mosaic_sm90, mosaic_cluster, xla"
    with pytest.raises(ValueError, match=f"implementation='cuda'.*{known}"):
        paged_decode(*arrays(), implementation="cuda")
    with pytest.raises(ValueError, match="implementation=\\(\\)"):
        paged_decode(*arrays(), implementation=())
    with pytest.raises(ValueError, match="operation='attention'"):
        available_implementations("attention")


def test_a_refusal_inside_a_call_falls_through(monkeypatch):
    def refuse(x):
        raise NotImplementedError("odd sizes")

    def answer(x):
        return x + 1

    for name, function in (("refusing", refuse), ("answering", answer)):
        fake = types.ModuleType(name)
        vars(fake)["act"] = function
        monkeypatch.setitem(sys.modules, name, fake)
    first, second = Implementation("first", "refusing"), Implementation("second", "answering")
    both = Operation("act", (first, second), lambda device, dtype: ("first", "second"))
    assert both(np.zeros(1), implementation=None, dtype=np.float32) == 1
    with pytest.raises(NotImplementedError, match="first: odd sizes"):
        both(np.zeros(1), implementation="first", dtype=np.float32)


def test_a_jax_without_triton_is_a_refusal(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    with pytest.raises(NotImplementedError, match="no Pallas Triton backend"):
        compat.triton_backend()


def test_tuning_is_packaged():
    folder = importlib.resources.files("pallas_kernels.tuning")
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".json")]
    assert "hopper.json" in names
    for name in names:
        table = json.loads((folder / name).read_text())
        assert table["device_kinds"] and table["measured"]


def test_tuned_entries_are_sizes_of_their_implementation():
    for table in tuning.tables():
        for entry in table["entries"]:
            sizes = module(entry["operation"], entry["implementation"]).Sizes
            sizes(**entry["use"])


def test_tuned_sizes_by_device():
    features = {"head_dim": 128, "itemsize": 2, "kv_itemsize": 2, "page_size": 64}
    found = tuning.tuned(H100, "paged_decode", "triton", features)
    assert found["block"] == 64
    h200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
    assert tuning.tuned(h200, "paged_decode", "triton", features) == found
    assert tuning.tuned(A100, "paged_decode", "triton", features) == {}
    assert tuning.tuned(CPU, "paged_decode", "triton", features) == {}


def test_a_table_matches_by_the_longest_name_and_its_ranges(monkeypatch):
    def table(kind, block):
        entry = {"operation": "o", "implementation": "i", "when": {"batch": [1, 8]}}
        return {"device_kinds": [kind], "entries": [{**entry, "use": {"block": block}}]}

    monkeypatch.setattr(tuning, "tables", lambda: (table("H100", 1), table("NVIDIA H100", 2)))
    assert tuning.tuned(H100, "o", "i", {"batch": 8}) == {"block": 2}
    assert tuning.tuned(H100, "o", "i", {"batch": 9}) == {}


def test_public_names():
    for name in pallas_kernels.__all__:
        assert getattr(pallas_kernels, name) is not None
    for name in ("paged_decode", "paged_prefill", "kv_write"):
        assert callable(getattr(pallas_kernels, name))


@quiet
def test_what_a_decode_call_takes_is_known_before_it_is_traced(monkeypatch):
    """Against the calls themselves, over shapes at which implementations leave a case to others."""
    taken = []
    trace = registry.traced_once

    def recorded(function, options):
        def run(*args, **kwargs):
            result = trace(function, options)(*args, **kwargs)
            taken.append(function.__module__.rpartition(".")[2])
            return result

        return run

    monkeypatch.setattr(registry, "traced_once", recorded)
    for place in (registry, *(module("paged_decode", name) for name in IMPLEMENTATIONS)):
        monkeypatch.setattr(place, "current_device", lambda: H100)
    for rows, kv_heads, head_dim, width, kv_dtype, asked, expected in (
        (1, 8, 128, 128, None, None, "mosaic_cluster"),
        (8, 8, 128, 128, None, None, "mosaic_cluster"),
        (9, 8, 128, 128, None, None, "triton"),
        (33, 2, 128, 128, None, None, "mosaic_cluster"),
        (34, 2, 128, 128, None, None, "triton"),
        (1, 1, 128, 128, None, None, "triton"),  # most of the device would be idle
        (8, 8, 128, 1, None, None, "triton"),  # a row has a single tile
        (1, 8, 64, 128, None, None, "triton"),  # the tuning table says so
        (1, 8, 128, 128, jnp.float8_e4m3fn, None, "triton"),
        (64, 8, 128, 128, None, "mosaic_sm90", "mosaic_sm90"),
        (1, 8, 128, 128, None, ("mosaic_sm90", "triton"), "mosaic_sm90"),
        (1, 8, 128, 128, None, "xla", "xla"),
    ):
        pages = (256, 64, kv_heads, head_dim)
        shapes = decode_shapes(rows, 4 * kv_heads, pages, width, kv_dtype=kv_dtype)
        q, k_pages, _, table, _ = shapes
        chosen = decode_implementation(q, k_pages, table, asked)
        jax.eval_shape(functools.partial(paged_decode, implementation=asked), *shapes)
        assert (chosen, taken.pop()) == (expected, expected)
    with pytest.raises(NotImplementedError, match="pages of float8_e4m3fn"):
        shapes = decode_shapes(1, 8, (256, 64, 8, 128), 128, kv_dtype=jnp.float8_e4m3fn)
        decode_implementation(shapes[0], shapes[1], shapes[3], "mosaic_sm90")
