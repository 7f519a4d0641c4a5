"""Runs PTX of the peer kernels on the host: several devices, whose warps go on in random order.

Knows the instructions that appear there and no others. A warp is 32 lanes, each with a program
counter of its own; those at the lowest one go on. What memory need not promise it does not:

- stores to peers (`st.relaxed.sys`) arrive word by word, in any order, at any time;
- plain stores to global memory are seen by others at the end of the kernel, or any time before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DTYPES = {
    kind: np.dtype(dtype)
    for kind, dtype in {
        "pred": np.bool_, "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "u64": np.uint64,
        "f32": np.float32, "b16": np.uint16, "f16": np.float16,
    }.items()
}  # fmt: skip
LANES = 32
ALL = np.ones(LANES, np.bool_)
ALL.setflags(write=False)
END = 1 << 30


class Memory:
    """All devices' global memory, bytes 0 to size."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.words = np.zeros(size // 4, np.uint32)
        self.rng = rng
        self.used = 64
        self.clock = 0
        self.tick = 1
        """Nanoseconds from one look at the clock to the next."""
        self.wires: list[tuple[np.ndarray, np.ndarray]] = []
        """Stores on their way to peers: (words, values)."""

    def new(self, array: np.ndarray) -> int:
        """Address of a copy of `array`."""
        at = self.used
        self.used += array.nbytes + 255 & -256
        self.words[at // 4 : (at + array.nbytes) // 4] = array.reshape(-1).view(np.uint32)
        return at

    def reserve(self, size: int) -> int:
        at = self.used
        self.used += size + 255 & -256
        return at

    def read(self, at: int, like: np.ndarray) -> np.ndarray:
        words = self.words[at // 4 : (at + like.nbytes) // 4]
        return words.view(like.dtype).reshape(like.shape).copy()

    def deliver(self, share: float) -> None:
        """About this share of the stores that are on their way."""
        kept = []
        for places, values in self.wires:
            arrives = self.rng.random(len(places)) < share
            self.words[places[arrives]] = values[arrives]
            if not arrives.all():
                kept.append((places[~arrives], values[~arrives]))
        self.wires = kept


class Program:
    """A text, parsed."""

    def __init__(self, text: str):
        self.kinds: dict[str, str] = {"%tid.x": "u32", "%ctaid.x": "u32"}
        self.labels: dict[str, int] = {}
        self.steps: list[tuple[str | None, bool, Callable[..., Any] | str]] = []
        for line in text.splitlines():
            line = line.strip().rstrip(";")
            if line.startswith(".reg"):
                _, kind, name = line.split()
                assert name not in self.kinds, f"{name} is declared twice"
                self.kinds[name] = kind.lstrip(".")
            elif line.endswith(":"):
                assert line[:-1] not in self.labels, f"label {line} twice"
                self.labels[line[:-1]] = len(self.steps)
            elif line not in ("{", "}", ""):
                guard, line = re.findall(r"^(?:@(!?\w+) )?(.*)$", line)[0]
                step = line if line.startswith(("bra ", "bar.")) else parse(line)
                self.steps.append((guard.lstrip("!") or None, not guard.startswith("!"), step))


def parse(line: str) -> Callable[[Warp, np.ndarray], None]:
    name, _, rest = line.partition(" ")
    parts = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
    op, *_, kind = name.split(".")
    if op in ("ld", "st", "red"):
        place, names = (parts[1], parts[0]) if op == "ld" else (parts[0], parts[1])
        registers = re.findall(r"[\w%]+", names)
        base, _, offset = place.strip("[]").partition("+")
        access = {"ld": load, "st": store, "red": accumulate}[op]
        return lambda warp, on: access(warp, on, name, registers, base, int(offset or 0), kind)
    to, *arguments = parts
    if name == "mov.b32" and to.startswith("{"):
        low, high = re.findall(r"\w+", to)
        return lambda warp, on: split(warp, on, low, high, arguments[0])
    if op == "setp":
        compare = {
            "eq": np.equal, "ne": np.not_equal, "lt": np.less, "gt": np.greater,
            "ge": np.greater_equal,
        }[name.split(".")[1]]  # fmt: skip
        return lambda warp, on: warp.put(
            to, compare(*(warp.get(x, kind) for x in arguments)), "pred", on
        )
    if op == "shfl":
        return lambda warp, on: warp.put(
            to, warp.shuffled(arguments[0], int(arguments[1]), on), "u32", on
        )
    function, read, result = OPERATIONS[name]
    kinds = read if isinstance(read, tuple) else (read,) * len(arguments)
    pairs = list(zip(arguments, kinds, strict=True))
    return lambda warp, on: warp.put(
        to, function(*[warp.get(x, kind) for x, kind in pairs]), result, on
    )


def _pair(dtype: Any) -> Callable[..., np.ndarray]:
    def rounded(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        parts = []
        for x in (high, low):
            bits = x.astype(dtype).view(np.uint16)
            parts.append(np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint32))
        return parts[0] << np.uint32(16) | parts[1]

    return rounded


def _operations() -> dict[str, tuple[Callable[..., Any], Any, str]]:
    """Of an instruction: what it does, how it reads its operands, what it gives."""
    import ml_dtypes

    wide = np.uint64
    return {
        "mov.u32": (lambda a: a, "u32", "u32"),
        "mov.b32": (lambda a: a, "b32", "b32"),
        "mov.f32": (lambda a: a, "f32", "f32"),
        "mov.u64": (lambda a: a, "u64", "u64"),
        "add.u32": (np.add, "u32", "u32"),
        "add.u64": (np.add, "u64", "u64"),
        "add.f32": (np.add, "f32", "f32"),
        "sub.u32": (np.subtract, "u32", "u32"),
        "mul.f32": (np.multiply, "f32", "f32"),
        "mul.lo.u32": (np.multiply, "u32", "u32"),
        "mul.wide.u32": (lambda a, b: a.astype(wide) * b.astype(wide), "u32", "u64"),
        "mad.lo.u32": (lambda a, b, c: a * b + c, "u32", "u32"),
        "mad.wide.u32": (
            lambda a, b, c: a.astype(wide) * b.astype(wide) + c, ("u32", "u32", "u64"), "u64",
        ),
        "fma.rn.f32": (
            lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32), "f32", "f32",
        ),
        "rsqrt.approx.f32": (lambda a: np.float32(1) / np.sqrt(a), "f32", "f32"),
        "rem.u32": (np.remainder, "u32", "u32"),
        "max.u32": (np.maximum, "u32", "u32"),
        "and.b32": (np.bitwise_and, "b32", "b32"),
        "or.b32": (np.bitwise_or, "b32", "b32"),
        "shl.b32": (np.left_shift, "b32", "b32"),
        "shr.u32": (np.right_shift, "u32", "u32"),
        "and.pred": (np.logical_and, "pred", "pred"),
        "selp.u32": (lambda a, b, p: np.where(p, a, b), ("u32", "u32", "pred"), "u32"),
        "selp.b32": (lambda a, b, p: np.where(p, a, b), ("b32", "b32", "pred"), "b32"),
        "cvt.u64.u32": (lambda a: a.astype(wide), "u32", "u64"),
        "cvt.f32.f16": (lambda a: a.astype(np.float32), "f16", "f32"),
        "cvt.rn.bf16x2.f32": (_pair(ml_dtypes.bfloat16), "f32", "b32"),
        "cvt.rn.f16x2.f32": (_pair(np.float16), "f32", "b32"),
    }  # fmt: skip


OPERATIONS = _operations()


@functools.cache
def _number(name: str, kind: str) -> np.ndarray:
    """A number of the text in all lanes, its bits read as `kind`."""
    if name.startswith("0f"):
        value = np.full(LANES, int(name[2:], 16), np.uint32).view(DTYPES[kind])
    else:
        assert re.match(r"-?\d|0x", name), f"{name} is read before it is written"
        value = np.full(LANES, int(name, 0), DTYPES[kind])
    value.setflags(write=False)
    return value


class Warp:
    """32 lanes of one block of one rank. operands: addresses, by $0, $1, ..."""

    def __init__(self, device: Device, block: Block, first: int):
        self.device, self.block = device, block
        self.at = np.zeros(LANES, np.int64)
        self.together: int | None = 0
        """The program counter of all lanes; None where they differ, and `at` has them."""
        self.waiting = False
        tids = np.arange(first, first + LANES, dtype=np.uint32)
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": tids,
            "%ctaid.x": np.full(LANES, block.number, np.uint32),
        }

    def get(self, name: str, kind: str) -> np.ndarray:
        """A register or a number, its bits read as `kind`."""
        dtype = DTYPES[kind]
        value = self.registers.get(name)
        if value is not None:
            if value.dtype is dtype:
                return value
            assert value.dtype.itemsize == dtype.itemsize, f"{name} read as {kind}"
            return value.view(dtype)
        if name == "%globaltimer":
            memory = self.device.memory
            memory.clock += memory.tick
            return np.full(LANES, memory.clock, np.uint64)
        if name.startswith("$"):
            return np.full(LANES, self.block.operands[int(name[1:])], dtype)
        return _number(name, kind)

    def put(self, name: str, value: np.ndarray, kind: str, on: np.ndarray) -> None:
        declared = DTYPES[self.block.program.kinds[name]]
        value = np.asarray(value, DTYPES[kind])
        if value.dtype is not declared:
            assert value.dtype.itemsize == declared.itemsize, f"{kind} into {name}"
            value = value.view(declared)
        if on is ALL or on.all():
            self.registers[name] = value
        else:  # lanes that never wrote it hold garbage
            old = self.registers.get(name)
            if old is None:
                old = np.full(LANES, 0x5A, np.uint8).repeat(value.itemsize).view(declared)
            self.registers[name] = np.where(on, value, old)

    def shuffled(self, name: str, distance: int, on: np.ndarray) -> np.ndarray:
        assert on.all(), "a lane is missing from a shuffle"
        return self.get(name, "u32")[np.arange(LANES) ^ distance]

    @property
    def done(self) -> bool:
        return self.together == END

    def run(self, steps: int) -> None:
        """Up to so many instructions, until a barrier or a jump back."""
        program = self.block.program
        for _ in range(steps):
            here, lanes = self.together, ALL
            if here is None:
                here = int(self.at.min())
                lanes = self.at == here
            if here >= len(program.steps):
                self.together = END
                self.block.running -= 1
                return
            guard, sense, step = program.steps[here]
            on = lanes
            if guard is not None:
                on = lanes & (self.get(guard, "pred") == sense)
                on = ALL if on.all() else on
            self.go(lanes, here + 1)
            if not isinstance(step, str):
                step(self, on)
            elif step.startswith("bra "):
                target = program.labels[step[4:]]
                self.go(on, target)
                if target <= here and on.any():
                    return
            else:
                assert lanes.all(), "a barrier without some lanes of a warp"
                self.waiting = True
                self.block.arrive()
                return

    def go(self, lanes: np.ndarray, to: int) -> None:
        """These lanes go on at `to`."""
        if lanes is ALL:
            self.together = to
            return
        if self.together is not None:
            self.at[:] = self.together
        self.at[lanes] = to
        first = int(self.at[0])
        self.together = first if (self.at == first).all() else None


def _places(warp: Warp, base: str, offset: int, size: int, on: np.ndarray) -> np.ndarray:
    """Word of each lane's address."""
    at = warp.get(base, "u64" if not _is_shared(warp, base) else "u32").astype(np.int64) + offset
    assert (at[on] % size == 0).all(), "unaligned"
    return at // 4


def _is_shared(warp: Warp, base: str) -> bool:
    if base.startswith("$"):
        return int(base[1:]) == warp.block.shared_operand
    return warp.block.program.kinds[base] == "u32"


def load(
    warp: Warp, on: np.ndarray, name: str, registers: list[str], base: str, offset: int, kind: str
) -> None:
    if not on.any():
        return
    wide = 2 if kind == "u64" else 1
    memory = warp.block.shared if ".shared" in name else warp.device.memory.words
    places = _places(warp, base, offset, 4 * wide * len(registers), on)
    safe = np.where(on, places, 0)
    for i, register in enumerate(registers):
        value = memory[safe + i * wide]
        if wide == 2:
            value = value.astype(np.uint64) | memory[safe + 2 * i + 1].astype(np.uint64) << 32
        warp.put(register, value, "u64" if wide == 2 else "u32", on)


def store(
    warp: Warp, on: np.ndarray, name: str, registers: list[str], base: str, offset: int, kind: str
) -> None:
    del kind
    if not on.any():
        return
    places = _places(warp, base, offset, 4 * len(registers), on)[on]
    values = [warp.get(register, "u32")[on] for register in registers]
    where = np.concatenate([places + i for i in range(len(registers))])
    what = np.concatenate(values)
    if ".shared" in name:
        warp.block.shared[where] = what
    elif "relaxed.sys" in name:
        warp.device.memory.wires.append((where, what))
    else:
        warp.device.pending.append((where, what))


def accumulate(
    warp: Warp, on: np.ndarray, name: str, registers: list[str], base: str, offset: int, kind: str
) -> None:
    assert name == "red.relaxed.sys.global.or.b32", name
    del kind
    values = warp.get(registers[0], "u32")
    for lane in np.flatnonzero(on):
        place = _places(warp, base, offset, 4, on)[lane]
        warp.device.memory.words[place] |= values[lane]


def split(warp: Warp, on: np.ndarray, low: str, high: str, name: str) -> None:
    value = warp.get(name, "b32")
    warp.put(low, (value & np.uint32(0xFFFF)).astype(np.uint16), "b16", on)
    warp.put(high, (value >> np.uint32(16)).astype(np.uint16), "b16", on)


class Block:
    """One block of a kernel: its warps, shared memory, and the barrier."""

    def __init__(self, device: Device, kernel: Kernel, number: int):
        self.number, self.program, self.operands = number, kernel.program, kernel.operands
        self.shared_operand = 6
        self.shared = np.zeros(4096, np.uint32)
        self.warps = [Warp(device, self, first) for first in range(0, kernel.threads, LANES)]
        self.running = len(self.warps)

    def arrive(self) -> None:
        if sum(warp.waiting for warp in self.warps) == self.running:
            for warp in self.warps:
                warp.waiting = False


class Kernel:
    """What a device is given to run. operands: addresses; that of shared memory is 0."""

    def __init__(self, program: Program, grid: int, threads: int, operands: list[int]):
        self.program, self.grid, self.threads = program, grid, threads
        self.operands = operands


class Device:
    """Runs its kernels one after the other."""

    def __init__(self, memory: Memory, kernels: list[Kernel]):
        self.memory, self.left = memory, list(kernels)
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.warps: list[Warp] = []

    @property
    def done(self) -> bool:
        return not self.warps and not self.left

    def flush(self, share: float) -> None:
        """About this share of the plain stores becomes visible."""
        kept = []
        for places, values in self.pending:
            if self.memory.rng.random() < share:
                self.memory.words[places] = values
            else:
                kept.append((places, values))
        self.pending = kept

    def step(self, rng: np.random.Generator) -> None:
        """A few instructions of one warp."""
        if not self.warps:
            self.flush(2.0)
            if self.left:
                kernel = self.left.pop(0)
                blocks = [Block(self, kernel, number) for number in range(kernel.grid)]
                self.warps = [warp for block in blocks for warp in block.warps]
            return
        ready = [warp for warp in self.warps if not warp.waiting]
        warp = ready[rng.integers(len(ready))]
        warp.run(int(rng.integers(1, 200)))
        if warp.done:
            self.warps.remove(warp)
            warp.block.arrive()


def run(devices: list[Device], memory: Memory, rng: np.random.Generator, most: int) -> None:
    """All devices to the end, at their own pace; now and then one lags far behind. most: steps
    altogether, after which they are thought to wait for ever."""
    for turn in _turns(devices, rng):
        most -= 1
        assert most > 0, "the devices wait for each other"
        with np.errstate(all="ignore"):
            turn.step(rng)
        if rng.random() < 0.2:
            memory.deliver(float(rng.choice([0.1, 0.5, 2.0])))
        if rng.random() < 0.05:
            turn.flush(0.3)
    for device in devices:
        device.flush(2.0)
    memory.deliver(2.0)


def _turns(devices: list[Device], rng: np.random.Generator) -> Iterator[Device]:
    slow = None
    while left := [device for device in devices if not device.done or device.pending]:
        if rng.random() < 0.02:
            slow = left[rng.integers(len(left))] if rng.random() < 0.7 else None
        device = left[rng.integers(len(left))]
        if device is not slow or rng.random() < 0.01 or len(left) == 1:
            yield device
