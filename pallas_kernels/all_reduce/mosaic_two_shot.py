"""All-reduce over peer memory in two steps: a rank sums its share of the words, and sends the sums.

Grid, blocks and threads as in the one-shot kernel. Word w of a thread of block b belongs to rank
(b + w) % n, so that every rank has the same share, of few rows too:

    x --st--> the owner's box                                    (a word to one peer)
    my boxes --ld until there--> + x, in the order of ranks      (of my words)
    their sums --st--> boxes of all peers                        (one word to n - 1)
    my boxes --ld until there--> the other words' sums
    + residual --> total --> sums of squares --> normed

A box has a place for each word's sum, then for each own word a place a peer. A rank sends
2 (n - 1) / n times the bytes, and waits twice.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.all_reduce.launch import launch
from pallas_kernels.all_reduce.plan import Plan, Sizes, check_room, cut
from pallas_kernels.all_reduce.protocol import Norm, Protocol, held, quad

MOST_WORDS = 8
"""Of a thread."""


def used_bytes(plan: Plan) -> int:
    """Of a block's boxes."""
    words = len(plan.each)
    return (words + -(-words // plan.ranks) * (plan.ranks - 1)) * plan.unit


def plan(rows: int, size: int, ranks: int, dtype: Any, sizes: Sizes | None = None) -> Plan:
    """Raises NotImplementedError for what the kernel cannot do."""
    found = cut(rows, size, ranks, dtype, sizes or Sizes(), MOST_WORDS)
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
    ranks, n = protocol.ranks, plan.ranks
    owners = range(min(n, len(plan.each)))  # words w, w + n, ... have one owner
    out.reg("u64", "mine", *(f"sums{k}" for k in ranks), *(f"from{k}" for k in ranks))
    out.reg("u64", *(f"to{j}" for j in owners))
    out.reg("u32", "first", *(f"owner{j}" for j in owners))
    out.reg("pred", *(f"own{j}" for j in owners))
    out.reg("b32", *(f"r{k}_{i}" for k in ranks for i in range(4)))
    fused = None
    if wide is not None:
        fused = Norm(protocol, rest[0], rest[1], wide)
    protocol.enter()
    add(f"rem.u32 first, block, {n};", "add.u64 mine, mybox, here;")
    for k in ranks:
        add(
            f"add.u64 sums{k}, box{k}, here;",
            f"setp.lt.s32 q, me, {k};",
            f"selp.u32 t, {max(k - 1, 0) * plan.unit}, {k * plan.unit}, q;",
            f"cvt.u64.u32 from{k}, t;",
            f"add.u64 from{k}, from{k}, mine;",
        )
    for j in owners:
        add(
            f"add.u32 owner{j}, first, {j};",
            f"setp.ge.u32 q, owner{j}, {n};",
            f"@q sub.u32 owner{j}, owner{j}, {n};",
            f"setp.eq.u32 own{j}, owner{j}, me;",
            f"mad.wide.u32 offset, owner{j}, 8, {comm};",
            f"ld.global.u64 to{j}, [offset];",
            f"setp.gt.u32 q, me, owner{j};",  # my place among its peers
            "mov.u32 t, me;",
            "@q sub.u32 t, me, 1;",
            f"mad.wide.u32 to{j}, t, {plan.unit}, to{j};",
            f"add.u64 to{j}, to{j}, here;",
        )

    def parts(index: int) -> int:
        """Offset of the places of word `index` in its owner's box, a place a peer."""
        return (len(plan.each) + index // n * (n - 1)) * plan.unit

    for word in plan.each:
        with protocol.having(word, f"PUSHED{word.index}"):
            protocol.fix(word)
            place = f"[to{word.index % n}+{parts(word.index)}]"
            store = f"st.relaxed.sys.global.v4.b32 {place}, {quad(held(word))};"
            add(f"@!own{word.index % n} {store}")
    protocol.clear()
    for word in plan.each:
        with protocol.having(word, f"GIVEN{word.index}"):
            add(f"@!own{word.index % n} bra NOTMINE{word.index};")
            for k in ranks:  # its own is what a rank does not load
                add(*(f"mov.b32 r{k}_{i}, {held(word)}_{i};" for i in range(4)))
            loads = [(f"other{k}", f"r{k}", f"from{k}+{parts(word.index)}") for k in ranks]
            protocol.poll(f"PARTS{word.index}", loads, list(ranks))
            protocol.add_up(word, None)
            for k in ranks:
                place = f"[sums{k}+{word.index * plan.unit}]"
                add(f"@other{k} st.relaxed.sys.global.v4.b32 {place}, {quad(held(word))};")
            add(f"NOTMINE{word.index}:")
    for word in plan.each:
        with protocol.having(word, f"SUMMED{word.index}"):
            add(f"@own{word.index % n} bra GOT{word.index};")
            load = (None, held(word), f"mine+{word.index * plan.unit}")
            protocol.poll(f"SUM{word.index}", [load], [f"owner{word.index % n}"])
            add(f"GOT{word.index}:")
            if fused:
                fused.add(word)
                fused.square(word)
            protocol.store(rest[2] if fused else rest[0], word)
    if fused:
        fused.share(rest[4])
    add("bar.sync 0;")
    if fused:
        fused.scale(rest[4], rest[3], eps)
    protocol.leave()
    return out.whole()
