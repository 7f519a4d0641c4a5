"""All-reduce over peer memory in one step: everybody sends all it has to everybody.

Grid (rows, at most 128). A block of up to 512 threads holds whole rows, a thread one word of 16
bytes in every 8,192 bytes of them:

    x, residual, norm --> registers                 (all loads in flight)
    x --st--> boxes of the n - 1 peers              (over NVLink, one way)
    my boxes --ld until there--> + x, in the order of ranks, + residual --> total
    total --> sums of squares, through shared memory once --> normed

The time is that of one launch and one store over NVLink. It sends n - 1 times the bytes, so larger
calls of more ranks are left to the two-shot kernel.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.all_reduce.launch import launch
from pallas_kernels.all_reduce.plan import Plan, Sizes, check_room, cut
from pallas_kernels.all_reduce.protocol import Norm, Protocol, held, quad

MOST_WORDS = 4
"""Of a thread: with the residual's and the peers' they fit 128 registers."""
MOST_ROWS = 256
"""Of two ranks."""
MOST_SENT = 2 << 20
"""Bytes that a rank of more sends."""


def used_bytes(plan: Plan) -> int:
    """Of a block's boxes."""
    return (plan.ranks - 1) * len(plan.each) * plan.unit


def plan(rows: int, size: int, ranks: int, dtype: Any, sizes: Sizes | None = None) -> Plan:
    """Raises NotImplementedError for what the kernel cannot do, or leaves to others."""
    found = cut(rows, size, ranks, dtype, sizes or Sizes(), MOST_WORDS)
    sent = rows * found.row_bytes * (ranks - 1)
    if sizes is None and sent > MOST_SENT and (ranks > 2 or rows > MOST_ROWS):
        raise NotImplementedError(
            f"{rows} rows of {size} numbers to {ranks - 1} peers are more than {MOST_SENT} bytes"
        )
    return check_room(found, used_bytes(found))


def all_reduce(
    x: jax.Array,
    comm: jax.Array | None,
    residual: jax.Array | None,
    norm: jax.Array | None,
    *,
    eps: float,
    axis_name: str,
    sizes: Sizes | None = None,
    interpret: Any = None,
) -> Any:
    """See pallas_kernels.all_reduce and all_reduce_add_norm. interpret: refused."""
    if interpret is not None:
        raise NotImplementedError("the interpreter knows no PTX")
    return launch(plan, text, x, comm, residual, norm, eps=eps, axis_name=axis_name, sizes=sizes)


def text(plan: Plan, wide: bool | None, eps: float) -> str:
    """Of the kernel. wide: whether norm is float32; None is without residual and norm."""
    x, comm, *rest = (f"${i}" for i in range(7))
    protocol = Protocol(plan, used_bytes(plan), x, comm)
    out, add = protocol.text, protocol.text.add
    stride = len(plan.each) * plan.unit  # of one peer's part of a block's boxes
    out.reg("u64", *(f"{name}{k}" for name in ("to", "from") for k in protocol.ranks))
    out.reg("b32", *(f"r{k}_{i}" for k in protocol.ranks for i in range(4)))
    fused = None
    if wide is not None:
        fused = Norm(protocol, rest[0], rest[1], wide)
    protocol.enter()
    for k in protocol.ranks:  # in a box the ranks stand in order, its owner left out
        add(
            f"setp.gt.s32 q, me, {k};",
            "mov.u32 t, me;",
            "@q sub.u32 t, me, 1;",
            f"mul.wide.u32 to{k}, t, {stride};",
            f"add.u64 to{k}, to{k}, here;",
            f"add.u64 to{k}, to{k}, box{k};",
            f"setp.lt.s32 q, me, {k};",
            f"selp.u32 t, {max(k - 1, 0) * stride}, {k * stride}, q;",
            f"cvt.u64.u32 from{k}, t;",
            f"add.u64 from{k}, from{k}, here;",
            f"add.u64 from{k}, from{k}, mybox;",
        )
    for word in plan.each:
        with protocol.having(word, f"PUSHED{word.index}"):
            protocol.fix(word)
            for k in protocol.ranks:
                place = f"[to{k}+{word.index * plan.unit}]"
                add(f"@other{k} st.relaxed.sys.global.v4.b32 {place}, {quad(held(word))};")
    protocol.clear()
    for word in plan.each:
        with protocol.having(word, f"SUMMED{word.index}"):
            for k in protocol.ranks:  # its own is what a rank does not load
                add(*(f"mov.b32 r{k}_{i}, {held(word)}_{i};" for i in range(4)))
            at = word.index * plan.unit
            loads = [(f"other{k}", f"r{k}", f"from{k}+{at}") for k in protocol.ranks]
            protocol.poll(str(word.index), loads, list(protocol.ranks))
            protocol.add_up(word, fused.residual(word) if fused else None)
            protocol.store(rest[2] if fused else rest[0], word)
            if fused:
                fused.square(word)
    if fused:
        fused.share(rest[4])
    add("bar.sync 0;")
    if fused:
        fused.scale(rest[4], rest[3], eps)
    protocol.leave()
    return out.whole()
