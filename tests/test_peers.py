"""How the devices of a mesh come to sum over peer memory, or do not."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxserve.parallel import access, peers
from jaxserve.parallel.mesh import mesh_of
from jaxserve.parallel.peers import Peers, connect, judged, within
from pallas_kernels.all_reduce.probe import Probe
from tests.cpu_devices import on_cpu_devices
from tests.kernels.support import ON_GPU, needs_gpu

ROOT = Path(__file__).parent.parent


class Driver:
    """The CUDA driver of a machine whose GPUs (i, j) in `blocked` have no access to each other.
    codes: what functions return that do not succeed."""

    def __init__(self, blocked: tuple[tuple[int, int], ...] = (), **codes: int):
        self.blocked, self.codes = blocked, codes
        self.calls: list[tuple[str, Any]] = []
        self.current: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            values = [getattr(x, "_obj", x) for x in arguments]
            self.calls.append((name, [getattr(x, "value", x) for x in values]))
            if name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain"):
                number = values[1] if isinstance(values[1], int) else values[1].value + 100
                values[0].value = number
            elif name == "cuDeviceCanAccessPeer":
                values[0].value = (values[1].value, values[2].value) not in self.blocked
            elif name == "cuCtxSetCurrent":
                self.current[threading.get_ident()] = values[0].value
            elif name == "cuCtxEnablePeerAccess":
                self.calls.append(("from", self.current[threading.get_ident()]))
            return self.codes.get(name, 0)

        return call

    def named(self, name: str) -> list[Any]:
        return [what for called, what in self.calls if called == name]


@pytest.mark.parametrize("code", [0, access.ALREADY_ENABLED])
def test_access_is_enabled_both_ways_on_another_thread(code):
    driver = Driver(cuCtxEnablePeerAccess=code)
    assert access.refusal([2, 5, 7], driver) is None
    enabled = zip(driver.named("from"), driver.named("cuCtxEnablePeerAccess"), strict=True)
    pairs = {(i, j[0]) for i, j in enabled}
    assert pairs == {(100 + i, 100 + j) for i in (2, 5, 7) for j in (2, 5, 7) if i != j}
    assert driver.named("cuDevicePrimaryCtxRelease_v2") == [[2], [5], [7]]
    assert threading.get_ident() not in driver.current


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(blocked=((5, 2),)), "GPU 5 cannot access the memory of GPU 2"),
        (Driver(cuCtxEnablePeerAccess=205), "cuCtxEnablePeerAccess of the CUDA driver .* 205"),
        (Driver(cuInit=100), "cuInit of the CUDA driver failed with error 100"),
    ],
)
def test_why_there_is_no_access(driver, reason):
    assert re.search(reason, access.refusal([2, 5], driver) or "")
    retained = driver.named("cuDevicePrimaryCtxRetain")
    assert len(driver.named("cuDevicePrimaryCtxRelease_v2")) == len(retained)


def test_a_machine_without_the_driver(monkeypatch):
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert access.refusal([0, 1]) == "CUDA's driver library is not there"


def test_one_device_has_no_peers():
    found = connect(mesh_of(jax.devices()[0]), 64, jnp.bfloat16)
    assert found == Peers("none", "one device")
    assert found.comm is None and found.quiet is None and found.error() is None


def test_a_self_test_that_hangs_is_left():
    forever = threading.Event()
    started = time.monotonic()

    def hang() -> Peers:
        forever.wait(60)
        return Peers("peer", "")

    found = within(0.2, hang)
    assert time.monotonic() - started < 10
    assert found == Peers("psum", "the self-test took more than 0.2 s")
    forever.set()


def test_a_self_test_that_fails(caplog):
    caplog.set_level("WARNING", logger="jaxserve")

    def fail() -> Peers:
        raise RuntimeError("no room for boxes")

    found = within(10, fail)
    assert found == Peers("psum", "the self-test failed: RuntimeError: no room for boxes")
    assert "no room for boxes" in caplog.text


@dataclasses.dataclass
class Memory:
    """A workspace whose ranks waited for these."""

    masks: list[int]
    comm: Any = "comm"
    quiet: Any = "quiet"

    def missing(self) -> list[int]:
        return self.masks


@pytest.mark.parametrize(
    ("found", "masks", "form", "reason"),
    [
        (Probe(0, 3.44, 21.0), [0, 0], "peer", "3.4 us over peer memory, 21.0 us with psum"),
        (Probe(0, 30.0, 21.0), [0, 0], "psum", "30.0 us over peer memory, 21.0 us with psum"),
        (Probe(7, 3.4, 21.0), [0, 0], "psum", "the self-test failed: 7 numbers of sums were wrong"),
        (
            Probe(7, 3.4, 21.0),
            [6, 0, 1],
            "psum",
            "the self-test failed: an all-reduce was given up after 3 s: "
            "rank 0 waited for 1, 2; rank 2 waited for 0",
        ),
    ],
)
def test_what_a_self_test_decides(found, masks, form, reason):
    memory: Any = Memory(masks)
    decided = judged(found, Peers("peer", "", memory))
    assert (decided.form, decided.reason) == (form, reason)
    kept = ("comm", "quiet") if form == "peer" else (None, None)
    assert (decided.comm, decided.quiet) == kept


@pytest.mark.skipif(ON_GPU, reason="about a machine without GPUs")
def test_devices_that_are_not_tried(monkeypatch):
    monkeypatch.setattr(peers, "first_device", lambda mesh: type("D", (), {"platform": "gpu"}))
    mesh = mesh_of(jax.devices()[0])
    assert "not cpu, bfloat16" in (peers.unfit(mesh, 64, jnp.bfloat16) or "")
    order = ("mosaic_one_shot",)
    monkeypatch.setattr(peers, "available_implementations", lambda name, dtype: order)
    assert peers.unfit(mesh, 64, jnp.bfloat16) == "1 ranks: peers are 2 to 8"


ON_EIGHT = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
from jaxserve.parallel.peers import Peers, connect
from pallas_kernels.all_reduce import workspace
from pallas_kernels.all_reduce.probe import CALLS, ROWS, Chain

mesh = Mesh(np.array(jax.devices())[None], ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
found = connect(mesh, 64, jnp.bfloat16)
chain = Chain(mesh, "tensor", ("xla",), 64, jnp.bfloat16, CALLS)
work = workspace.make(mesh, "tensor", patience=1.5)
wrong = [chain.run(work.comm)]
parts, exact = chain._arrays
chain._arrays = parts, exact.at[0, 3].add(1)
wrong.append(chain.run(work.comm))

comm, quiet, absent = (np.asarray(x) for x in (work.comm, work.quiet, work.missing_but(5)))
addresses = comm[:, :16].copy().view(np.uint64)
owns = comm[:, 18:22].copy().view(np.uint64)
shards = {s.index[0].start: s.data.unsafe_buffer_pointer() for s in work.boxes.addressable_shards}
states = {s.index[0].start: s.data.unsafe_buffer_pointer() for s in work.state.addressable_shards}
late = dataclasses.replace(work, state=work.state.at[3, 0].set(1 << 6))
print(json.dumps({
    "found": [found.form, found.reason, found.comm is None], "wrong": wrong,
    "ranks": comm[:, 16].tolist(), "patience": comm[:, 17].tolist(),
    "quiet": quiet[:, 16].tolist(), "absent": absent[:, 16].tolist(),
    "only_ranks": bool((np.delete(quiet, 16, 1) == np.delete(comm, 16, 1)).all()),
    "addresses": bool((addresses == [shards[i] for i in range(8)]).all()),
    "own": bool((owns == [[states[i], shards[i]] for i in range(8)]).all()),
    "boxes": [work.boxes.shape[0], bool((work.boxes.addressable_shards[7].data == -1).all())],
    "missing": [work.missing(), late.missing()],
    "error": [Peers("peer", "", w).error() for w in (work, late)],
}))
"""


@pytest.fixture(scope="module")
def on_eight() -> dict[str, Any]:
    return json.loads(on_cpu_devices(8, "-c", ON_EIGHT).splitlines()[-1])


def test_cpu_devices_use_psum(on_eight):
    assert on_eight["found"] == ["psum", "cpu devices have no peer memory", True]


def test_the_self_test_counts_wrong_numbers(on_eight):
    assert on_eight["wrong"] == [0, 8 * 3]  # one number, of 8 devices, in 3 calls


def test_a_workspace_tells_each_device_of_the_others(on_eight):
    assert on_eight["ranks"] == list(range(8)) and on_eight["patience"] == [1500] * 8
    assert on_eight["quiet"] == [-1] * 8 and on_eight["only_ranks"]
    assert on_eight["absent"] == [0, 1, 2, 3, 4, -1, 6, 7]
    assert on_eight["addresses"] and on_eight["own"] and on_eight["boxes"] == [8, True]


def test_who_was_waited_for_is_read_anew(on_eight):
    assert on_eight["missing"] == [[0] * 8, [0, 0, 0, 64, 0, 0, 0, 0]]
    assert on_eight["error"][0] is None and "rank 3 waited for 6" in on_eight["error"][1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(ON_GPU and len(jax.devices()) < 2, reason="needs two GPUs")
def test_gpus_decide_and_say_why():
    devices = np.array(jax.devices()[:2])[None]
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    found = connect(mesh, 4096, jnp.bfloat16)
    print(found.form, found.reason)
    assert found.form in ("peer", "psum") and found.reason and found.error() is None
