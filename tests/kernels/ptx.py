"""Runs the PTX of pallas_kernels.cluster_ops on the host, one thread after the other.

Knows the instructions that appear there and no others. Memory is a dict from byte address to word:
global memory under the key None, each block's shared memory under its rank; a `shared::cluster`
address is (rank, address). Barriers count bytes only: their order is the device's business.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

WORD = {"b16": 2, "b32": 4, "f32": 4}


class Thread:
    """One thread of block `rank`. operands: what $0, $1, ... stand for. sent: bytes that arrived
    at each block's barrier."""

    def __init__(self, rank: int, tid: int, operands: list[Any], memory: Any, sent: dict[int, int]):
        self.rank, self.operands, self.memory, self.sent = rank, operands, memory, sent
        self.registers: dict[str, Any] = {"%tid.x": np.uint32(tid), "%cluster_ctarank": rank}

    def run(self, text: str) -> None:
        lines = [line.strip().rstrip(";") for line in text.splitlines()]
        at = 0
        while at < len(lines):
            guard, line = re.findall(r"^(?:@(!?\w+) )?(.*)$", lines[at])[0]
            at += 1
            if guard and bool(self.registers[guard.lstrip("!")]) == guard.startswith("!"):
                continue
            if line.startswith("bra "):
                at = lines.index(line[4:] + ":")
            elif not re.match(r"[{}.]|\w+:|barrier|fence|$", line):
                self.step(line)

    def value(self, name: str) -> Any:
        if name.startswith("$"):
            return self.operands[int(name[1:])]
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(np.float32)
        return self.registers[name] if name in self.registers else int(name)

    def place(self, text: str) -> Any:
        """[register+offset] as an address."""
        base, _, offset = text.strip("[]").partition("+")
        address, offset = self.value(base), int(offset or 0)
        if isinstance(address, tuple):
            return address[0], address[1] + offset
        return int(address) + offset

    def step(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        parts = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
        op, kind = name.split(".")[0], name.split(".")[-1]
        if op in ("ld", "st"):
            self.move(name, op, kind, parts)
            return
        if op == "mbarrier":
            self.registers[parts[0]] = True
            return
        to, *arguments = parts
        a, *others = (self.value(x) for x in arguments)
        if op == "mapa":
            result = (int(others[0]), int(a))
        elif op == "mad" and isinstance(others[-1], tuple):
            result = (others[1][0], int(a) * int(others[0]) + others[1][1])
        elif op == "add" and isinstance(a, tuple):
            result = (a[0], a[1] + int(others[0]))
        else:
            result = self.compute(name, a, others)
        self.registers[to] = result

    def compute(self, name: str, a: Any, others: list[Any]) -> Any:
        if name.endswith("f32"):
            f = np.float32
            op = name.split(".")[0]
            if op == "cvt":
                return f(a)
            table = {
                "mov": lambda: a, "max": lambda: max(a, *others), "sub": lambda: a - others[0],
                "ex2": lambda: np.exp2(a), "div": lambda: a / others[0],
                "fma": lambda: a * others[0] + others[1],
            }  # fmt: skip
            return f(table[op]())
        a, others = int(a), [int(x) for x in others]
        table = {
            "mov": lambda: a, "and": lambda: a & others[0], "xor": lambda: a ^ others[0],
            "shr": lambda: a >> others[0], "add": lambda: a + others[0],
            "mad": lambda: a * others[0] + others[1],
        }  # fmt: skip
        if name.startswith("setp"):
            return {"lt": a < others[0], "ge": a >= others[0]}[name.split(".")[1]]
        return table[name.split(".")[0]]()

    def move(self, name: str, op: str, kind: str, parts: list[str]) -> None:
        place, registers = (parts[1], parts[0]) if op == "ld" else (parts[0], parts[1])
        names, size = re.findall(r"[$\w]+", registers), WORD[kind]
        address = self.place(place)
        space = None if ".global" in name else self.rank
        if isinstance(address, tuple):
            space, address = address
            rank, _ = self.value(parts[2].strip("[]"))
            assert rank == space, "a barrier of another block than the data's"
            self.sent[space] = self.sent.get(space, 0) + size * len(names)
        assert address % (size * len(names)) == 0, "unaligned"
        for i, register in enumerate(names):
            where = address + i * size
            if op == "ld":
                self.registers[register] = self.memory[space][where]
            else:
                assert where not in self.memory[space], "written twice"
                self.memory[space][where] = self.value(register)
