"""all_reduce: the peer kernels' PTX on simulated devices, their lowering, and the XLA form."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import pallas_kernels
from pallas_kernels import Device, available_implementations, compat
from pallas_kernels.all_reduce import mosaic_one_shot, mosaic_two_shot, probe, protocol, workspace
from pallas_kernels.all_reduce.cases import Case
from pallas_kernels.all_reduce.plan import Plan, Sizes
from pallas_kernels.all_reduce.reference import all_reduce, all_reduce_add_norm
from tests.kernels import simt
from tests.kernels.support import ON_GPU, needs_gpu, quiet, shape_list
from tests.marks import long, long_but

pytestmark = quiet
ROOT = Path(__file__).parent.parent
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
FORMS = {"one_shot": mosaic_one_shot, "two_shot": mosaic_two_shot}
BF16 = ml_dtypes.bfloat16
EPS = 1e-5
SMALL = Sizes(blocks=3, threads=128)


@dataclasses.dataclass(frozen=True)
class Call:
    """One all-reduce of all ranks. wide: of the fused kernel, whether norm is float32; None is the
    plain one."""

    form: str
    rows: int
    size: int
    wide: bool | None = None
    sizes: Sizes = SMALL
    dtype: Any = BF16

    def plan(self, ranks: int) -> Plan:
        return FORMS[self.form].plan(self.rows, self.size, ranks, self.dtype, self.sizes)

    def inputs(self, seed: int, ranks: int) -> tuple[np.ndarray, ...]:
        """Random numbers; in the first row -0, infinities, NaN, and what a word is when empty."""
        case = Case("", self.rows, self.size)
        parts, residual, norm = case.inputs(seed, ranks, self.dtype)
        parts[:, 0, 0], residual[0, 0] = -0.0, -0.0
        parts[0, 0, 1] = parts[-1, 0, 2] = np.inf
        parts[0, 0, 3], parts[-1, 0, 3] = np.inf, -np.inf
        parts[1, 0, 4] = np.nan
        parts[seed % ranks, 0, 8:16].view(np.uint16)[:] = 0xFFFF
        return parts, residual, norm.astype(np.float32 if self.wide else self.dtype)


class World:
    """Ranks with a workspace each, and what they are to do."""

    def __init__(self, ranks: int, calls: list[Call], seed: int, patience: float = 1e6):
        self.ranks, self.rng = ranks, np.random.default_rng(seed)
        part = workspace.region(ranks)
        size = workspace.BUFFERS * workspace.BLOCKS * part
        self.memory = memory = simt.Memory((size + (1 << 21)) * ranks, self.rng)
        self.states = [memory.reserve(4 * workspace.STATE_WORDS) for _ in range(ranks)]
        boxes = [memory.reserve(size) for _ in range(ranks)]
        most = max(call.plan(ranks).grid for call in calls)
        for at in boxes:
            everything = memory.words[at // 4 : (at + size) // 4]
            everything.reshape(workspace.BUFFERS, workspace.BLOCKS, -1)[:, :most] = workspace.EMPTY
        self.comm = workspace.comm_rows(boxes, self.states, patience=patience)
        self.calls = [(call, call.inputs(i + seed, ranks)) for i, call in enumerate(calls)]
        self.outs: list[list[list[int]]] = []

    def run(
        self, change: Callable[[str], str] = lambda text: text, quiet: tuple[int, ...] = (),
        most: int = 40_000,
    ) -> None:  # fmt: skip
        """change: of the text, to see that it is noticed. quiet: ranks that do not take part."""
        comms = []
        for rank, row in enumerate(self.comm):
            row = row.copy()
            if rank in quiet:
                row[workspace.RANK_AT // 4] = -1
            comms.append(self.memory.new(row))
        kernels: list[list[simt.Kernel]] = [[] for _ in range(self.ranks)]
        for call, (parts, residual, norm) in self.calls:
            plan = call.plan(self.ranks)
            text = FORMS[call.form].text(plan, call.wide, EPS)
            program = simt.Program(change(text))
            outs = []
            for rank in range(self.ranks):
                fused = call.wide is not None
                given = [self.memory.new(parts[rank]), comms[rank]]
                given += [self.memory.new(x) for x in (residual, norm)] if fused else []
                outs.append([self.memory.reserve(parts[rank].nbytes) for _ in range(1 + fused)])
                operands = [*given, *outs[-1], *([0] if fused else [])]
                kernels[rank].append(simt.Kernel(program, plan.grid, plan.threads, operands))
            self.outs.append(outs)
        devices = [simt.Device(self.memory, todo) for todo in kernels]
        simt.run(devices, self.memory, self.rng, most)

    def errors(self) -> list[int]:
        return [int(self.memory.words[at // 4]) for at in self.states]

    def check(self) -> None:
        """Every result of every rank."""
        for (call, (parts, residual, norm)), outs in zip(self.calls, self.outs, strict=True):
            got = [[self.memory.read(at, parts[0]) for at in rank] for rank in outs]
            for other in got[1:]:  # bitwise the same
                for mine, theirs in zip(got[0], other, strict=True):
                    np.testing.assert_array_equal(mine.view(np.uint16), theirs.view(np.uint16))
            with np.errstate(invalid="ignore"):
                total = all_reduce(parts)
                if call.wide is not None:
                    rounded = call.form == "two_shot"
                    total, normed = all_reduce_add_norm(
                        parts, residual, norm, eps=EPS, rounded=rounded
                    )
                    wanted = normed[1:], got[0][1][1:].astype(np.float32)
                    np.testing.assert_allclose(*wanted, rtol=2e-2, atol=1e-3)
            found = got[0][0].astype(np.float32)
            np.testing.assert_array_equal(found, total)
            assert np.signbit(found[0, 0]) and np.isnan(found[0, [3, 4, *range(8, 16)]]).all()
            assert np.isposinf(found[0, 1:3]).all() and not np.isnan(found[1:]).any()
        assert self.errors() == [0] * self.ranks


def mixed(form: str) -> list[Call]:
    """Of both kernels, with few and many rows in turn, so that blocks count differently."""
    other = {"one_shot": "two_shot", "two_shot": "one_shot"}[form]
    call = functools.partial(Call, form)
    return [
        call(1, 128),
        call(3, 128, False),
        call(5, 64),
        call(1, 128, True),
        call(2, 896, False),
        Call(other, 4, 128),
        call(1, 1032, sizes=Sizes(3, 256)),
        call(1, 64),
        Call(other, 1, 64, False),
        call(1, 64),
        call(4, 128, False, dtype=np.float16),
        call(1, 128),
    ]


@pytest.mark.parametrize(
    ("ranks", "form", "seed"),
    [
        (2, "two_shot", 0),
        (3, "one_shot", 0),
        (8, "two_shot", 0),
        long(2, "one_shot", 0),
        long(3, "two_shot", 0),
        long(8, "one_shot", 0),
        *(long(ranks, form, 1) for ranks in (2, 3, 8) for form in FORMS),
    ],
)
def test_many_calls_on_ranks_at_their_own_pace(ranks, form, seed):
    world = World(ranks, mixed(form)[: 6 if ranks == 8 else None], seed)
    world.run()
    world.check()


def test_as_many_words_as_a_thread_can_have():
    """Several rows and several chunks of them, the last ones not whole."""
    for ranks, call in (
        (2, Call("one_shot", 3, 2104, False, Sizes(2, 256))),
        (4, Call("two_shot", 7, 1096, True, Sizes(2, 128))),
    ):
        assert len(call.plan(ranks).each) == FORMS[call.form].MOST_WORDS
        world = World(ranks, [call] * 4, seed=ranks)
        world.run()
        world.check()


def noticing(form: str) -> World:
    """Two ranks and calls enough for a broken protocol to show."""
    return World(2, [Call(form, 3, 128, False), *[Call(form, 3, 128)] * 6], seed=1)


NOTHING_EMPTIED = r"st.global.v4.b32 \[clear\], .*", ""
NANS_LIKE_EMPTY_WORDS = r"selp.b32 (x\w+), \d+, \1, q;", ""
NOBODY_WAITS = r"setp.ne.u32 q, m, 4294967295;", "setp.eq.u32 q, m, m;"
ONE_THREAD_EMPTIES = r"mov.u32 filled, \d+;", "mov.u32 filled, 16;"


@pytest.mark.parametrize(
    ("line", "instead", "form"),
    [
        (*NOTHING_EMPTIED, "one_shot"),
        (*NANS_LIKE_EMPTY_WORDS, "two_shot"),
        (*NOBODY_WAITS, "two_shot"),
        (*ONE_THREAD_EMPTIES, "one_shot"),
        long(*NOTHING_EMPTIED, "two_shot"),
        long(*NANS_LIKE_EMPTY_WORDS, "one_shot"),
        long(*NOBODY_WAITS, "one_shot"),
        long(*ONE_THREAD_EMPTIES, "two_shot"),
    ],
)
def test_a_kernel_that_breaks_the_protocol_is_noticed(form, line, instead):
    changes: list[bool] = []

    def change(text: str) -> str:
        changed = re.sub(line, instead, text)
        changes.append(changed != text)
        return changed

    world = noticing(form)
    with pytest.raises(AssertionError):
        world.run(change, most=8_000)
        world.check()
    assert len(changes) == len(world.calls) and all(changes)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_as_they_are_break_nothing_there(form):
    world = noticing(form)
    world.run(most=8_000)
    world.check()


@pytest.mark.parametrize("form", long_but(FORMS, "two_shot"))
def test_two_buffers_would_not_do(monkeypatch, form):
    monkeypatch.setattr(protocol, "BUFFERS", 2)
    with pytest.raises(AssertionError):
        for seed in range(4):
            world = World(2, [Call(form, 3, 128)] * 12, seed)
            world.run(most=10_000)
            world.check()


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_that_does_not_come_is_given_up(form):
    """The others end, all of their calls, and know whom they missed."""
    calls = [Call(form, 3, 64), Call(form, 2, 64, False), Call(form, 1, 64)]
    world = World(4, calls, seed=0, patience=1e-3)
    world.memory.tick = 20_000  # 50 looks at the clock
    world.run(quiet=(2,))
    errors = world.errors()
    assert errors[2] == 0 and all(errors[rank] for rank in (0, 1, 3))
    if form == "one_shot":
        assert errors == [4, 4, 0, 4]
    else:  # where 2 owns nothing, who waits for it is waited for
        assert errors[0] & 4 and errors[1] & 4


@pytest.mark.parametrize("form", FORMS)
def test_quiet_ranks_return_at_once(form):
    """Nothing is read or written but their inputs: the workspace is as it was."""
    world = World(2, [Call(form, 3, 128, False)] * 2, 0)
    before = world.memory.words.copy()
    first = world.memory.used
    world.run(quiet=(0, 1))
    np.testing.assert_array_equal(world.memory.words[16 : first // 4], before[16 : first // 4])
    for outs in world.outs:
        for at in itertools.chain(*outs):
            assert not world.memory.read(at, np.zeros(384, np.uint16)).any()


MODEL_SIZES = (896, 1024, 2560, 3584, 4096, 5120, 8192)


@pytest.mark.parametrize("size", MODEL_SIZES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_decode_steps_of_models_are_taken(ranks, size):
    """All of two ranks up to 256 rows in one step; of more ranks what is small."""
    for rows in (1, 8, 33, 64, 130, 256):
        form = mosaic_one_shot
        if ranks > 2 and rows * size * 2 * (ranks - 1) > 2 << 20:
            form = mosaic_two_shot
            with pytest.raises(NotImplementedError, match="peers are more than"):
                mosaic_one_shot.plan(rows, size, ranks, BF16)
        plan = form.plan(rows, size, ranks, BF16)
        assert plan.grid <= workspace.BLOCKS and plan.threads % 128 == 0 and plan.threads <= 512
        assert form.used_bytes(plan) <= workspace.region(ranks)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((4, 64, 2, np.float32), "dtype float32"),
        ((4, 100, 2, BF16), "rows of 100 numbers"),
        ((0, 64, 2, BF16), "no rows"),
        ((4, 64, 1, BF16), "1 ranks"),
        ((4, 64, 9, BF16), "9 ranks"),
        ((4096, 4096, 2, BF16), "words a thread"),
        ((1, 65536, 8, BF16), "bytes of a block's|words a thread"),
    ],
)
def test_what_the_peer_kernels_leave_to_xla(arguments, reason):
    for form in FORMS.values():
        with pytest.raises(NotImplementedError, match=reason):
            form.plan(*arguments)


def module(text: str, plan: Plan, fused: bool) -> str:
    """The text as a whole PTX module."""
    count = 6 if fused else 3
    body = re.sub(r"\$(\d)", r"%operand\1", text)
    parameters = ", ".join(f".param .u64 p{i}" for i in range(count))
    shared = [".reg .u32 %operand6;", "mov.u32 %operand6, scratch;"] if fused else []
    return "\n".join(
        [
            ".version 8.0",
            ".target sm_90a",
            ".address_size 64",
            f".visible .entry kernel({parameters}) .maxntid {plan.threads}, 1, 1 {{",
            f".shared .align 16 .b8 scratch[{plan.slots * 128}];",
            *shared,
            *(f".reg .u64 %operand{i};" for i in range(count)),
            *(f"ld.param.u64 %operand{i}, [p{i}];" for i in range(count)),
            body,
            "ret;",
            "}",
        ]
    )


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs CUDA's ptxas")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 8])
def test_the_text_assembles_and_fits_the_registers(tmp_path, ranks, form):
    for rows, size, wide, dtype in (
        (1, 4096, False, BF16),
        (64, 896, True, np.float16),
        (200, 2560, None, BF16),
        (64, 8192, False, BF16),
    ):
        plan = FORMS[form].plan(rows, size, ranks, dtype, Sizes())
        file = tmp_path / "kernel.ptx"
        file.write_text(module(FORMS[form].text(plan, wide, EPS), plan, wide is not None))
        command = ["ptxas", "-arch=sm_90a", "-v", str(file), "-o", str(tmp_path / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found = re.search(r"(\d+) bytes spill stores", done.stderr)
        assert found and int(found[1]) <= 64, done.stderr


def lowered(ranks: int, rows: int, size: int, norm: Any) -> str:
    """Both operations on a mesh of H100s, as StableHLO."""
    mesh = compat.abstract_gpus({"tensor": ranks})
    parts, whole = PartitionSpec("tensor"), PartitionSpec()

    def local(x, residual, norm, comm):
        total, normed = pallas_kernels.all_reduce_add_norm(x[0], residual, norm, comm)
        return total, pallas_kernels.all_reduce(normed, comm)

    function = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(parts, whole, whole, parts),
        out_specs=(whole, whole),
        check_vma=False,
    )
    wide = ((ranks, rows, size), jnp.bfloat16), ((rows, size), jnp.bfloat16)
    comm = ((ranks, workspace.COMM_WORDS), jnp.int32)
    shapes = shape_list([*wide, ((size,), norm), comm])
    return compat.lower_for_cuda(function, *shapes, mesh=mesh)


@pytest.mark.parametrize("norm", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("ranks", "rows", "size", "form"),
    [
        (2, 1, 896, "one_shot"),
        (2, 64, 5120, "one_shot"),
        (2, 256, 8192, "one_shot"),
        (2, 512, 4096, "two_shot"),
        (4, 64, 4096, "one_shot"),
        (4, 256, 4096, "two_shot"),
        (8, 1, 8192, "one_shot"),
        (8, 256, 8192, "two_shot"),
        (8, 8, 2560, "one_shot"),
        (2, 2048, 4096, "xla"),
        (8, 4096, 8192, "xla"),
    ],
)
def test_lowers_for_cuda(monkeypatch, ranks, rows, size, form, norm):
    monkeypatch.setattr("pallas_kernels.registry.current_device", lambda: H100)
    texts: list[str] = []
    for name, home in FORMS.items():

        def text(*arguments, make=home.text, name=name):
            texts.append(name)
            return make(*arguments)

        monkeypatch.setattr(home, "text", text)
    jax.clear_caches()  # a trace of another test would not come here
    program = lowered(ranks, rows, size, norm)
    assert texts == ([form] * 2 if form != "xla" else [])
    assert ("mosaic_gpu" in program) == (form != "xla")
    assert ("stablehlo.all_reduce" in program) == (form == "xla")


def test_the_self_test_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr("pallas_kernels.registry.current_device", lambda: H100)
    mesh = compat.abstract_gpus({"data": 1, "tensor": 2})
    shape = (probe.ROWS, 4096)
    comm = ((2, workspace.COMM_WORDS), jnp.int32)
    shapes = shape_list([((2, *shape), jnp.bfloat16), (shape, jnp.bfloat16), comm])
    names = ("mosaic_one_shot", "mosaic_two_shot")
    text = compat.lower_for_cuda(probe.chained(mesh, "tensor", names, 3), *shapes, mesh=mesh)
    assert "mosaic_gpu" in text and "stablehlo.all_reduce" not in text
    text = compat.lower_for_cuda(probe.chained(mesh, "tensor", ("xla",), 3), *shapes, mesh=mesh)
    assert "mosaic_gpu" not in text and "stablehlo.all_reduce" in text


@pytest.mark.parametrize(
    ("device", "dtype", "order"),
    [
        (H100, BF16, ("mosaic_one_shot", "mosaic_two_shot", "xla")),
        (H100, np.float32, ("xla",)),
        (Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108), BF16, ("xla",)),
        (Device("cpu", "cpu"), BF16, ("xla",)),
    ],
)
def test_default_orders(device, dtype, order):
    assert available_implementations("all_reduce", dtype, device) == order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 64), np.int32)}, "x has dtype int32"),
        ({"x": np.zeros(64, np.float32)}, r"x \[64\]"),
        ({"residual": np.zeros((3, 64), np.float32)}, r"residual \[3, 64\]"),
        ({"residual": np.zeros((4, 64), np.float16)}, "residual has dtype float16"),
        ({"norm": np.zeros(32, np.float32)}, r"norm \[32\]"),
        ({"norm": np.zeros(64, np.int8)}, "norm has dtype int8"),
        ({"comm": np.zeros((2, 32), np.int32)}, r"comm is int32\[2, 32\]"),
        ({"comm": np.zeros((1, 32), np.float32)}, "comm is float32"),
    ],
)
def test_mistakes_are_named(change, message):
    x = np.zeros((4, 64), np.float32)
    arguments = {"x": x, "residual": x, "norm": np.ones(64, np.float32), "comm": None, **change}
    with pytest.raises(ValueError, match=message):
        pallas_kernels.all_reduce_add_norm(**arguments)


def on_mesh(**environment: str) -> dict[str, int]:
    """What tests.kernels.on_mesh found right."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.on_mesh"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, **environment},
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_xla_on_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    right = on_mesh(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert right == {"xla 2": 5, "xla 4": 5, "xla 8": 10}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(ON_GPU and len(jax.devices()) < 2, reason="needs two GPUs")
def test_on_devices():
    """Real shapes too; in a process that would be killed if devices waited for each other."""
    right = on_mesh(XLA_PYTHON_CLIENT_PREALLOCATE="false")
    for ranks in (n for n in (2, 4, 8) if n <= len(jax.devices())):
        for name in ("mosaic_one_shot", "mosaic_two_shot", "xla"):
            assert right[f"{name} {ranks}"] >= 10
