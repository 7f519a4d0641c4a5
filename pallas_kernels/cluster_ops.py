"""Blocks of one cluster merge their shares of a softmax through distributed shared memory.

Block s of S has unnormalised sums acc_s [G, H] float32 and a running maximum top_s and total_s [G];
block r returns columns [r * H/S, (r+1) * H/S) of the merged output, so every block sends and stores
as much as any other:

    block s   registers --st.async--> box[s] of block r: acc_s[:, columns of r], top_s, total_s
                                      barrier of block r: counts bytes
    block r   waits for S * G * (H/S + 2) * 4 bytes, merges, stores [G, H/S]

A sent value brings its own arrival (complete_tx), so nobody sends a flag or fences memory; the only
handshake is that every block has set its barrier up, which `start_exchange` announces and
`await_blocks` waits for, both while the first keys are on their way.

Pallas has no store to a peer that leaves from some threads only and counts no arrival of each of
128 threads, hence the PTX, through Pallas's own `inline_mgpu`. The interpreter knows no PTX.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic_ops import WGMMA, plgpu
from pallas_kernels.ptx import asm, constant, global_address, scope, shared_address
from pallas_kernels.softmax import TINY

ROWS = 8
"""Rows of a box: of wgmma's 64 the first 8 are one register set of one warp."""
THREADS = 128


def exchange_scratch(blocks: int, head_dim: int) -> list[Any]:
    """Shared memory of the exchange: box of sums, box of (top, total), barrier."""
    return [
        plgpu.SMEM((blocks, ROWS, head_dim // blocks), jnp.float32),
        plgpu.SMEM((blocks, ROWS, 2), jnp.float32),
        plgpu.SMEM((4,), jnp.int32),
    ]


def start_exchange(barrier: Any, *, blocks: int, group: int, head_dim: int) -> None:
    """Set this block's barrier up and say so to the others; waits for nothing."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(ctx: Any, barrier: Any) -> None:
        del ctx
        asm(_start_text(blocks, group, head_dim), "r", shared_address(barrier))

    start(barrier)


def await_blocks() -> None:
    """Wait until every block of the cluster has announced its exchange; nothing may be sent before.
    The wait drops the L1's contents, so it does not belong right before the sending."""

    @plgpu.inline_mgpu()
    def wait(ctx: Any) -> None:
        del ctx
        asm("barrier.cluster.wait.acquire.aligned;")

    wait()


def send_shares(
    acc: Any, top: Any, total: Any, box: Any, sums: Any, barrier: Any, *,
    blocks: int, group: int, head_dim: int,
) -> None:  # fmt: skip
    """Send rows 0..group of acc [64, H], top [64] and total [64] (in wgmma's layouts), each block's
    columns to that block. Every thread of every block of the cluster must come here."""
    row_layout = WGMMA.reduce(1)
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(WGMMA, row_layout, row_layout, ref, ref, ref))
    def send(ctx: Any, acc: Any, top: Any, total: Any, box: Any, sums: Any, barrier: Any) -> None:
        del ctx
        # a thread holds of rows lane / 4 and 8 + lane / 4 two columns of every eight
        pairs = acc.registers.reshape(head_dim // 8, 2)[:, 0]
        values = [_element(pair, i) for pair in pairs for i in (0, 1)]
        values += [_element(x.registers.flat[0], 0) for x in (top, total)]
        addresses = [shared_address(x) for x in (box, sums, barrier)]
        constraints = ",".join(["f"] * len(values) + ["r"] * 3)
        asm(_send_text(blocks, group, head_dim), constraints, *values, *addresses)

    send(acc, top, total, box, sums, barrier)


def merge_shares(
    box: Any, sums: Any, barrier: Any, out: Any, *, blocks: int, group: int, head_dim: int,
    dtype: Any,
) -> None:  # fmt: skip
    """Wait for every block's share, and store this block's columns of out [group, H] (a contiguous
    slice of an array in global memory); a row whose total is 0 is 0."""
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref, ref))
    def merge(ctx: Any, box: Any, sums: Any, barrier: Any, out: Any) -> None:
        del ctx
        addresses = [shared_address(x) for x in (box, sums, barrier)]
        text = _merge_text(blocks, group, head_dim, jnp.dtype(dtype).name)
        asm(text, "r,r,r,l", *addresses, global_address(out))

    merge(box, sums, barrier, out)


def load_queries(q: Any, q_tile: Any, *, group: int, head_dim: int, transforms: Any) -> None:
    """q [group, H] (a contiguous slice in global memory, 16-bit) -> the first rows of q_tile
    [64, H], tiled (8, 64) and swizzled by 128 bytes. TMA would need 8 rows in global memory, which
    a group of 4 or 7 has not; the copy by threads hides behind the first keys' way. Commit the
    shared memory before wgmma reads it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(transforms)))
    def load(ctx: Any, q: Any, q_tile: Any) -> None:
        del ctx
        asm(_load_text(group, head_dim), "l,r", global_address(q), shared_address(q_tile))

    load(q, q_tile)


def _start_text(blocks: int, group: int, head_dim: int) -> str:
    sent = blocks * group * (head_dim // blocks + 2) * 4
    return scope([
        ".reg .pred first;",
        ".reg .u32 tid;",
        "mov.u32 tid, %tid.x;",
        "setp.eq.u32 first, tid, 0;",
        "@first mbarrier.init.shared::cta.b64 [$0], 1;",
        f"@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {sent};",
        "fence.mbarrier_init.release.cluster;",
        "barrier.cluster.arrive.relaxed.aligned;",
    ])  # fmt: skip


def _send_text(blocks: int, group: int, head_dim: int) -> str:
    columns = head_dim // blocks
    values = head_dim // 4  # of a thread
    top, total, box, sums, barrier = (f"${values + i}" for i in range(5))
    store = "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32"
    lines = [
        ".reg .pred other;",
        ".reg .u32 tid, pair, row, me, at, to, bar;",
        "mov.u32 tid, %tid.x;",
        "and.b32 pair, tid, 3;",
        "shr.u32 row, tid, 2;",
        f"setp.ge.u32 other, row, {group};",
        "@other bra END;",
        "mov.u32 me, %cluster_ctarank;",
        f"mad.lo.u32 at, me, {ROWS}, row;",
    ]
    for block in range(blocks):
        lines += [
            f"mapa.shared::cluster.u32 bar, {barrier}, {block};",
            f"mapa.shared::cluster.u32 to, {box}, {block};",
            f"mad.lo.u32 to, at, {columns * 4}, to;",
            "mad.lo.u32 to, pair, 8, to;",
        ]
        for eight in range(columns // 8):
            value = 2 * (block * (columns // 8) + eight)
            lines.append(f"{store} [to+{eight * 32}], {{${value}, ${value + 1}}}, [bar];")
    # the four threads of a row share its maximum and total, and the blocks to tell
    for first in range(0, blocks, 4):
        if first + 4 > blocks:
            lines += [f"setp.ge.u32 other, pair, {blocks - first};", "@other bra END;"]
        lines += [
            f"add.u32 tid, pair, {first};",
            f"mapa.shared::cluster.u32 bar, {barrier}, tid;",
            f"mapa.shared::cluster.u32 to, {sums}, tid;",
            "mad.lo.u32 to, at, 8, to;",
            f"{store} [to], {{{top}, {total}}}, [bar];",
        ]
    return scope([*lines, "END:"])


def _merge_text(blocks: int, group: int, head_dim: int, dtype: str) -> str:
    box, sums, barrier, out = "$0", "$1", "$2", "$3"
    columns = head_dim // blocks
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    each = range(blocks)
    lines = [
        ".reg .pred done, outside;",
        ".reg .u32 tid, row, column, at, me;",
        ".reg .u64 to;",
        ".reg .b16 result;",
        ".reg .f32 highest, total, value;",
        f".reg .f32 top<{blocks}>, total<{blocks}>, value<{blocks}>;",
        "mov.u32 tid, %tid.x;",
        "mov.u32 me, %cluster_ctarank;",
        "WAIT:",
        f"mbarrier.try_wait.parity.shared::cta.b64 done, [{barrier}], 0;",
        "@!done bra WAIT;",
    ]
    for _ in range(0, group * columns, THREADS):
        lines += [
            f"setp.ge.u32 outside, tid, {group * columns};",
            "@outside bra END;",
            f"shr.u32 row, tid, {_log2(columns)};",
            f"and.b32 column, tid, {columns - 1};",
            f"mad.lo.u32 at, row, 8, {sums};",
            *(f"ld.shared.v2.f32 {{top{i}, total{i}}}, [at+{i * ROWS * 8}];" for i in each),
            f"mad.lo.u32 at, row, {columns * 4}, {box};",
            "mad.lo.u32 at, column, 4, at;",
            *(f"ld.shared.f32 value{i}, [at+{i * ROWS * columns * 4}];" for i in each),
            "mov.f32 highest, top0;",
            *(f"max.f32 highest, highest, top{i};" for i in each[1:]),
            "mov.f32 total, 0f00000000;",
            "mov.f32 value, 0f00000000;",
        ]
        for i in each:
            lines += [
                f"sub.f32 top{i}, top{i}, highest;",
                f"ex2.approx.ftz.f32 top{i}, top{i};",
                f"fma.rn.f32 total, top{i}, total{i}, total;",
                f"fma.rn.f32 value, top{i}, value{i}, value;",
            ]
        lines += [
            f"max.f32 total, total, {constant(TINY)};",
            "div.full.f32 value, value, total;",
            f"cvt.rn.{short}.f32 result, value;",
            f"mad.lo.u32 at, row, {head_dim}, column;",
            f"mad.lo.u32 at, me, {columns}, at;",
            f"mad.wide.u32 to, at, 2, {out};",
            "st.global.b16 [to], result;",
            f"add.u32 tid, tid, {THREADS};",
        ]
    return scope([*lines, "END:"])


def _load_text(group: int, head_dim: int) -> str:
    q, tile = "$0", "$1"
    chunks = head_dim // 8  # of 16 bytes in a row
    lines = [
        ".reg .pred mine;",
        ".reg .u32 tid, row, chunk, at, half;",
        ".reg .u64 from;",
        ".reg .b32 a, b, c, d;",
        "mov.u32 tid, %tid.x;",
    ]
    for _ in range(0, group * chunks, THREADS):
        lines += [
            f"setp.lt.u32 mine, tid, {group * chunks};",
            f"mad.wide.u32 from, tid, 16, {q};",
            "@mine ld.global.v4.b32 {a, b, c, d}, [from];",
            f"shr.u32 row, tid, {_log2(chunks)};",
            f"and.b32 chunk, tid, {chunks - 1};",
            "shr.u32 half, chunk, 3;",
            "xor.b32 chunk, chunk, row;",
            "and.b32 chunk, chunk, 7;",
            f"mad.lo.u32 at, half, 1024, {tile};",
            "mad.lo.u32 at, row, 128, at;",
            "mad.lo.u32 at, chunk, 16, at;",
            "@mine st.shared.v4.b32 [at], {a, b, c, d};",
            f"add.u32 tid, tid, {THREADS};",
        ]
    return scope(lines)


def _log2(x: int) -> int:
    return x.bit_length() - 1


def _element(vector: Any, i: int) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    index = utils.c(i, ir.IntegerType.get_signless(32))
    return llvm.extractelement(vector, index)
