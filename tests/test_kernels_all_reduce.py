"""all_reduce: the peer kernels' PTX on simulated devices, their lowering, and the XLA form."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.all_reduce import mosaic_one_shot, mosaic_two_shot, protocol, workspace
from pallas_kernels.all_reduce.cases import EDGES, Case
from pallas_kernels.all_reduce.plan import Plan, Sizes
from pallas_kernels.all_reduce.reference import all_reduce, all_reduce_add_norm
from tests.kernels import simt

FORMS = {"one_shot": mosaic_one_shot, "two_shot": mosaic_two_shot}
BF16 = ml_dtypes.bfloat16
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Call:
    """One all-reduce of all ranks. wide: of the fused kernel, whether norm is float32; None is the
    plain one."""

    form: str
    rows: int
    size: int
    wide: bool | None = None
    sizes: Sizes = Sizes(blocks=3, threads=128)
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_many_calls_on_ranks_at_their_own_pace(ranks, form, seed):
    world = World(ranks, mixed(form), seed)
    world.run()
    world.check()
