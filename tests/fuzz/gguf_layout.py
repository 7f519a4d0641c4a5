"""A GGUF file taken apart and put together again, as loosely as one likes."""

from __future__ import annotations

import dataclasses
import struct

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _ALIGNMENT = 8, 9, 32


@dataclasses.dataclass
class Pair:
    key: bytes
    kind: int
    payload: bytes


@dataclasses.dataclass
class Row:
    name: bytes
    shape: list[int]
    kind: int
    offset: int


@dataclasses.dataclass
class Layout:
    """version, tensor_count, pair_count: as written; None counts what there is."""

    pairs: list[Pair]
    rows: list[Row]
    data: bytes
    version: int = 3
    tensor_count: int | None = None
    pair_count: int | None = None
    raw: bytes | None = None
    """The whole file instead, where set."""

    def replace(self, key: bytes, payload: bytes) -> None:
        for pair in self.pairs:
            if pair.key == key:
                pair.payload = payload

    def to_bytes(self) -> bytes:
        if self.raw is not None:
            return self.raw
        tensors = len(self.rows) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        out = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, tensors, pairs))
        for pair in self.pairs:
            out += text(pair.key) + struct.pack("<I", pair.kind) + pair.payload
        for row in self.rows:
            shape = struct.pack(f"<{len(row.shape)}Q", *row.shape)
            out += text(row.name) + struct.pack("<I", len(row.shape)) + shape
            out += struct.pack("<IQ", row.kind, row.offset)
        return bytes(out + bytes(-len(out) % _ALIGNMENT)) + self.data


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def parse(data: bytes) -> Layout:
    """data: a good file."""
    at = 24
    _, tensors, pairs = struct.unpack("<IQQ", data[4:at])

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def number(code: str) -> int:
        return struct.unpack(code, take(struct.calcsize(code)))[0]

    def value(kind: int) -> None:
        if kind == _STRING:
            take(number("<Q"))
        elif kind == _ARRAY:
            inner, count = number("<I"), number("<Q")
            for _ in range(count):
                value(inner)
        else:
            take(_SIZES[kind])

    found = Layout([], [], b"")
    for _ in range(pairs):
        key, kind = take(number("<Q")), number("<I")
        start = at
        value(kind)
        found.pairs.append(Pair(key, kind, data[start:at]))
    for _ in range(tensors):
        name = take(number("<Q"))
        shape = [number("<Q") for _ in range(number("<I"))]
        found.rows.append(Row(name, shape, number("<I"), number("<Q")))
    found.data = data[at + -at % _ALIGNMENT :]
    return found
