"""The protocol of the peer kernels, as PTX (after the Lamport-style kernels of TensorRT-LLM).

Call k of a block, on every rank alike:

    push    own words into buffer k % 3 of the peers' boxes        st.relaxed.sys, 16 bytes a thread
    clear   own buffer (k - 1) % 3, that of the call before        plain stores
    poll    own buffer k % 3 until no word is EMPTY                ld.relaxed.sys
    sum     in the order of ranks, in float32, so that all ranks get the same bits

No flag, fence or barrier: each word brings its own arrival. A peer that is a call ahead writes into
the buffer that the last call has cleared, and it cannot be two ahead. What a thread pushes goes to
the same thread of the same block of its peers, so no thread waits for another of its own block.

Polling ends after the patience of comm. A rank that gives up leaves in its error word who did not
answer, and from then on waits for nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from pallas_kernels.all_reduce.plan import WORD, Plan, Word
from pallas_kernels.all_reduce.workspace import (
    BLOCKS,
    BUFFERS,
    EMPTY,
    HEADERS_AT,
    OWN_AT,
    RANK_AT,
    STATE_AT,
    region,
)
from pallas_kernels.ptx import constant, scope

NO_EMPTY = 0x7FFF7FFF
"""What is sent in place of EMPTY: also two NaNs, in bfloat16 and float16."""
LOOKS = 32
"""Polls, of some 0.7 us, from one look at the clock to the next, a power of two."""


class Text:
    """PTX that is being written: registers are declared where they are first needed."""

    def __init__(self) -> None:
        self._registers: list[str] = []
        self._lines: list[str] = []

    def reg(self, kind: str, *names: str) -> None:
        self._registers += [f".reg .{kind} {name};" for name in names]

    def add(self, *lines: str) -> None:
        self._lines += lines

    def whole(self) -> str:
        return scope([*self._registers, *self._lines])


def quad(name: str) -> str:
    """Four registers, a word."""
    return "{" + ", ".join(f"{name}_{i}" for i in range(4)) + "}"


def held(word: Word) -> str:
    """Name of the registers that keep a word: what is sent, then its sum."""
    return f"x{word.index}"


class Protocol:
    """Writes one kernel's text."""

    def __init__(self, plan: Plan, used: int, x: str, comm: str) -> None:
        """used: bytes of a block's boxes that a call fills at most. x, comm: operands."""
        self.plan, self.used, self.comm = plan, used, comm
        self.text = text = Text()
        self.ranks = range(plan.ranks)
        text.reg("pred", "q", "failed", *(f"other{k}" for k in self.ranks))
        text.reg("u32", "tid", "block", "me", "ms", "error", "buffer", "before", "filled")
        text.reg("u32", "at", "place", "m", "t", "missing", "polls")
        text.reg("u64", "own", "header", "here", "clear", "offset", "rows", "until", "now", "limit")
        text.reg("u64", *(f"box{k}" for k in self.ranks), "mybox")
        text.reg("b32", *(f"{held(word)}_{i}" for word in plan.each for i in range(4)))
        text.reg("f32", "low", "high", "g", "h")
        text.reg("b16", "half0", "half1")
        text.add("mov.u32 tid, %tid.x;", "mov.u32 block, %ctaid.x;")
        self._guards()
        text.add(
            f"mul.lo.u32 at, block, {plan.row_bytes};",
            f"mad.lo.u32 at, tid, {WORD}, at;",
            "cvt.u64.u32 rows, at;",
            f"ld.global.v2.u32 {{me, ms}}, [{comm}+{RANK_AT}];",
            f"ld.global.u64 own, [{comm}+{STATE_AT}];",
            f"ld.global.u64 mybox, [{comm}+{OWN_AT}];",
            *(f"ld.global.u64 box{k}, [{comm}+{8 * k}];" for k in self.ranks),
        )
        self.load(x, held)

    def _guards(self) -> None:
        """Predicates of the words that not every thread, or not every block has."""
        plan, add = self.plan, self.text.add
        last_slot = plan.rows - (plan.slots - 1) * plan.grid
        last_chunk = plan.words - (plan.chunks - 1) * plan.threads
        self._partial_slot, self._partial_chunk = last_slot < plan.grid, last_chunk < plan.threads
        self.text.reg("pred", "inslot", "inchunk", "inboth")
        add(f"setp.lt.u32 inslot, block, {last_slot};")
        add(f"setp.lt.u32 inchunk, tid, {last_chunk};")
        add("and.pred inboth, inslot, inchunk;")

    def guard(self, word: Word) -> str | None:
        """Predicate of the threads that have `word`; None if all do."""
        slot = self._partial_slot and word.slot == self.plan.slots - 1
        chunk = self._partial_chunk and word.chunk == self.plan.chunks - 1
        return {(0, 0): None, (1, 0): "inslot", (0, 1): "inchunk", (1, 1): "inboth"}[slot, chunk]

    @contextlib.contextmanager
    def having(self, word: Word, label: str) -> Iterator[None]:
        """What is written in the block is for the threads that have `word`."""
        guard = self.guard(word)
        if guard:
            self.text.add(f"@!{guard} bra {label};")
        yield
        if guard:
            self.text.add(f"{label}:")

    def _row_offset(self, word: Word) -> int:
        plan = self.plan
        return word.slot * plan.grid * plan.row_bytes + word.chunk * plan.unit

    def load(self, array: str, name) -> None:
        """A thread's words of an array [rows, D] into registers name(word)."""
        self.text.add(f"add.u64 offset, {array}, rows;")
        for word in self.plan.each:
            guard = self.guard(word)
            load = f"ld.global.v4.b32 {quad(name(word))}, [offset+{self._row_offset(word)}];"
            self.text.add(f"@{guard} {load}" if guard else load)

    def store(self, array: str, word: Word) -> None:
        self.text.add(
            f"add.u64 offset, {array}, rows;",
            f"st.global.v4.b32 [offset+{self._row_offset(word)}], {quad(held(word))};",
        )

    def enter(self) -> None:
        """Which buffer, and where it is; a quiet rank leaves."""
        size = region(self.plan.ranks)
        self.text.add(
            "setp.lt.s32 q, me, 0;",
            "@q bra END;",
            "mad.wide.u32 header, block, 8, own;",
            f"ld.global.v2.u32 {{buffer, filled}}, [header+{HEADERS_AT}];",
            "ld.relaxed.sys.global.u32 error, [own];",
            "setp.ne.u32 failed, error, 0;",
            "@failed mov.u32 ms, 0;",
            "mov.u64 until, 0;",
            "mov.u32 polls, 0;",
            f"mul.lo.u32 place, block, {size};",
            f"mad.lo.u32 place, tid, {WORD}, place;",
            f"mad.lo.u32 at, buffer, {size * BLOCKS}, place;",
            "cvt.u64.u32 here, at;",
            "setp.eq.u32 q, buffer, 0;",
            "sub.u32 before, buffer, 1;",
            f"selp.u32 before, {BUFFERS - 1}, before, q;",
            f"mad.lo.u32 at, before, {size * BLOCKS}, place;",
            "cvt.u64.u32 clear, at;",
            "add.u64 clear, mybox, clear;",
            *(f"setp.ne.u32 other{k}, me, {k};" for k in self.ranks),
        )

    def fix(self, word: Word) -> None:
        """No word that is sent is EMPTY."""
        for i in range(4):
            x = f"{held(word)}_{i}"
            self.text.add(f"setp.eq.u32 q, {x}, {EMPTY};", f"selp.b32 {x}, {NO_EMPTY}, {x}, q;")

    def clear(self) -> None:
        """Empty what the last call has filled."""
        self.text.add(
            f"mul.lo.u32 at, tid, {WORD};",
            f"mov.b32 t, {EMPTY};",
            "CLEAR:",
            "setp.ge.u32 q, at, filled;",
            "@q bra CLEARED;",
            "st.global.v4.b32 [clear], {t, t, t, t};",
            f"add.u64 clear, clear, {self.plan.unit};",
            f"add.u32 at, at, {self.plan.unit};",
            "bra CLEAR;",
            "CLEARED:",
        )

    def poll(self, label: str, loads: Sequence[tuple[str | None, str, str]], sources) -> None:
        """Load until no word is EMPTY. loads: (predicate, register, address) of each word.
        sources: of each word, the rank it comes from, a number or a register."""
        add = self.text.add
        names = [f"{name}_{i}" for _, name, _ in loads for i in range(4)]
        add(f"POLL{label}:")
        for predicate, name, address in loads:
            load = f"ld.relaxed.sys.global.v4.b32 {quad(name)}, [{address}];"
            add(f"@{predicate} {load}" if predicate else load)
        add(f"mov.u32 m, {names[0]};", *(f"max.u32 m, m, {name};" for name in names[1:]))
        add(
            f"setp.ne.u32 q, m, {EMPTY};",
            f"@q bra THERE{label};",
            "add.u32 polls, polls, 1;",
            f"and.b32 t, polls, {LOOKS - 1};",
            "setp.ne.u32 q, t, 0;",
            f"@q bra POLL{label};",
            "mov.u64 now, %globaltimer;",
            "setp.eq.u64 q, until, 0;",
            "mul.wide.u32 limit, ms, 1000000;",
            "@q add.u64 until, now, limit;",
            "setp.lt.u64 q, now, until;",
            f"@q bra POLL{label};",
            "mov.u32 missing, 0;",
        )
        for (_, name, _), source in zip(loads, sources, strict=True):
            add(
                f"mov.u32 m, {name}_0;",
                *(f"max.u32 m, m, {name}_{i};" for i in range(1, 4)),
                f"setp.eq.u32 q, m, {EMPTY};",
                "mov.u32 t, 1;",
                f"shl.b32 t, t, {source};",
                "@q or.b32 missing, missing, t;",
            )
        # of those missed later nobody knows whether they would have come
        add("@!failed red.relaxed.sys.global.or.b32 [own], missing;", f"THERE{label}:")

    def unpack(self, register: str, low: str = "low", high: str = "high") -> None:
        """Two numbers of `register` as float32."""
        if self.plan.dtype == "bfloat16":
            self.text.add(
                f"shl.b32 t, {register}, 16;",
                f"mov.b32 {low}, t;",
                f"and.b32 t, {register}, 0xFFFF0000;",
                f"mov.b32 {high}, t;",
            )
        else:
            self.text.add(
                f"mov.b32 {{half0, half1}}, {register};",
                f"cvt.f32.f16 {low}, half0;",
                f"cvt.f32.f16 {high}, half1;",
            )

    def pack(self, register: str) -> None:
        """low and high, rounded, into `register`. A NaN becomes 0x7FFF: never EMPTY."""
        short = {"bfloat16": "bf16x2", "float16": "f16x2"}[self.plan.dtype]
        self.text.add(f"cvt.rn.{short}.f32 {register}, high, low;")

    def add_to(self, register: str) -> None:
        """low, high += the two numbers of `register`."""
        self.unpack(register, "g", "h")
        self.text.add("add.f32 low, low, g;", "add.f32 high, high, h;")

    def add_up(self, word: Word, residual: str | None) -> None:
        """Sum of what is in r0, r1, ... in the order of ranks, and of `residual`, rounded once."""
        for i in range(4):
            self.unpack(f"r0_{i}")
            for k in self.ranks[1:]:
                self.add_to(f"r{k}_{i}")
            if residual:
                self.add_to(f"{residual}_{i}")
            self.pack(f"{held(word)}_{i}")

    def leave(self) -> None:
        """After a barrier: everyone has read the header."""
        self.text.add(
            f"setp.eq.u32 q, buffer, {BUFFERS - 1};",
            "add.u32 buffer, buffer, 1;",
            "selp.u32 buffer, 0, buffer, q;",
            f"mov.u32 filled, {self.used};",
            "setp.eq.u32 q, tid, 0;",
            f"@q st.global.v2.u32 [header+{HEADERS_AT}], {{buffer, filled}};",
            "END:",
        )


class Norm:
    """RMSNorm of the rows that a kernel holds, between its sums and its end."""

    def __init__(self, protocol: Protocol, residual: str, norm: str, wide: bool) -> None:
        """residual, norm: operands. wide: norm is float32, else of x's dtype."""
        self.protocol, self.text, self.plan = protocol, protocol.text, protocol.plan
        plan, text = self.plan, self.text
        self.wide = wide
        text.reg("u32", "lane", "warp", "shared")
        text.reg("f32", "factor", "k0", "k1", "k2", "k3", *(f"ss{s}" for s in range(plan.slots)))
        text.reg("b32", *(f"e{word.index}_{i}" for word in plan.each for i in range(4)))
        text.reg("b32", *(f"w{c}_{i}" for c in range(plan.chunks) for i in range(4 + 4 * wide)))
        protocol.load(residual, self.residual)
        step = WORD * (1 + wide)
        text.add(f"mad.wide.u32 offset, tid, {step}, {norm};")
        for word in plan.each[: plan.chunks]:
            whole = word.chunk < plan.chunks - 1 or plan.words % plan.threads == 0
            for part in range(1 + wide):
                names = ", ".join(f"w{word.chunk}_{4 * part + i}" for i in range(4))
                at = word.chunk * plan.threads * step + part * WORD
                load = f"ld.global.v4.b32 {{{names}}}, [offset+{at}];"
                text.add(load if whole else f"@inchunk {load}")
        text.add(*(f"mov.f32 ss{s}, {constant(0.0)};" for s in range(plan.slots)))

    @staticmethod
    def residual(word: Word) -> str:
        """Name of the registers with a word of the residual."""
        return f"e{word.index}"

    def add(self, word: Word) -> None:
        """The residual to a sum that is rounded already."""
        for i in range(4):
            self.protocol.unpack(f"{held(word)}_{i}")
            self.protocol.add_to(f"{self.residual(word)}_{i}")
            self.protocol.pack(f"{held(word)}_{i}")

    def square(self, word: Word) -> None:
        """The norm is that of what is stored, rounded."""
        for i in range(4):
            self.protocol.unpack(f"{held(word)}_{i}")
            self.text.add(
                f"fma.rn.f32 ss{word.slot}, low, low, ss{word.slot};",
                f"fma.rn.f32 ss{word.slot}, high, high, ss{word.slot};",
            )

    def share(self, shared: str) -> None:
        """Each warp's sums of squares into shared memory [slots, 32] float32. A barrier follows."""
        add = self.text.add
        add("and.b32 lane, tid, 31;", "shr.u32 warp, tid, 5;")
        add(f"mad.lo.u32 shared, warp, 4, {shared};")
        for slot in range(self.plan.slots):
            for step in (16, 8, 4, 2, 1):
                add(f"shfl.sync.bfly.b32 g, ss{slot}, {step}, 31, 0xffffffff;")
                add(f"add.f32 ss{slot}, ss{slot}, g;")
            add("setp.eq.u32 q, lane, 0;", f"@q st.shared.f32 [shared+{slot * 128}], ss{slot};")

    def scale(self, shared: str, normed: str, eps: float) -> None:
        """The rows that are held, normalised, into the array `normed`."""
        plan, add = self.plan, self.text.add
        for slot in range(plan.slots):
            add(f"mov.f32 factor, {constant(0.0)};")
            for warp in range(0, plan.threads // 32, 4):
                at = slot * 128 + warp * 4
                add(f"ld.shared.v4.f32 {{k0, k1, k2, k3}}, [{shared}+{at}];")
                add(*(f"add.f32 factor, factor, k{i};" for i in range(4)))
            add(
                f"mul.f32 factor, factor, {constant(1.0 / plan.size)};",
                f"add.f32 factor, factor, {constant(eps)};",
                "rsqrt.approx.f32 factor, factor;",
            )
            for word in plan.each[slot * plan.chunks : (slot + 1) * plan.chunks]:
                with self.protocol.having(word, f"SCALED{word.index}"):
                    self._scale(word)
                    self.protocol.store(normed, word)

    def _scale(self, word: Word) -> None:
        for i in range(4):
            register = f"{held(word)}_{i}"
            self.protocol.unpack(register)
            if self.wide:
                low, high = f"w{word.chunk}_{2 * i}", f"w{word.chunk}_{2 * i + 1}"
                self.text.add(f"mov.b32 g, {low};", f"mov.b32 h, {high};")
            else:
                self.protocol.unpack(f"w{word.chunk}_{i}", "g", "h")
            for name, weight in (("low", "g"), ("high", "h")):
                self.text.add(
                    f"mul.f32 {name}, {name}, factor;", f"mul.f32 {name}, {name}, {weight};"
                )
            self.protocol.pack(register)
