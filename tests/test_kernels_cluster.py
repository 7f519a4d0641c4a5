"""The PTX that the blocks of a cluster exchange their shares with, run by a small interpreter."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cluster_ops
from pallas_kernels.paged_decode.mosaic_cluster import merge
from pallas_kernels.softmax import NEG
from tests.kernels.ptx import Thread
from tests.marks import long

BOX, SUMS, BARRIER, OUT = 1 << 16, 1 << 14, 1 << 12, 1 << 20


@pytest.mark.parametrize(
    ("blocks", "group", "head_dim"),
    [
        (8, 7, 64),
        (4, 1, 64),
        (2, 5, 128),
        long(16, 4, 128),
        long(8, 4, 128),
        long(8, 8, 128),
        long(2, 8, 128),
    ],
)
def test_shares_are_sent_and_merged(blocks, group, head_dim):
    rng = np.random.default_rng(blocks)
    acc = rng.standard_normal((blocks, group, head_dim), np.float32)
    top = rng.standard_normal((blocks, group), np.float32) * 5
    total = rng.random((blocks, group), np.float32) + 0.5
    acc[1], top[1], total[1] = 0, NEG, 0  # a block without tiles
    memory, sent = {None: {}, **{block: {} for block in range(blocks)}}, {}

    text = cluster_ops._send_text(blocks, group, head_dim)
    for block in range(blocks):
        for tid in range(cluster_ops.THREADS):
            row, pair = tid // 4, tid % 4
            values = [np.float32(np.nan)] * (head_dim // 4 + 2)
            if row < group:  # wgmma's layout: columns 8j + 2 * pair and the next
                columns = acc[block, row].reshape(-1, 4, 2)[:, pair].ravel()
                values = [*columns, top[block, row], total[block, row]]
            Thread(block, tid, [*values, BOX, SUMS, BARRIER], memory, sent).run(text)
    expected = blocks * group * (head_dim // blocks + 2) * 4
    assert sent == dict.fromkeys(range(blocks), expected)
    assert f"{expected};" in cluster_ops._start_text(blocks, group, head_dim)

    text = cluster_ops._merge_text(blocks, group, head_dim, "bfloat16")
    for block in range(blocks):
        for tid in range(cluster_ops.THREADS):
            Thread(block, tid, [BOX, SUMS, BARRIER, OUT], memory, sent).run(text)
    got = [memory[None].pop(OUT + 2 * i) for i in range(group * head_dim)]
    assert not memory[None]
    want = merge(*(jnp.asarray(x)[:, None, None] for x in (acc, top, total)))
    np.testing.assert_allclose(np.reshape(got, want.shape), want, rtol=1e-5, atol=1e-6)


def test_a_row_without_tokens_is_zero():
    memory = {None: {}, 0: {}}
    for row in range(cluster_ops.ROWS):
        for split in range(2):
            at = SUMS + (split * cluster_ops.ROWS + row) * 8
            memory[0] |= {at: np.float32(NEG), at + 4: np.float32(0)}
    memory[0] |= {BOX + 4 * i: np.float32(0) for i in range(2 * cluster_ops.ROWS * 32)}
    for tid in range(cluster_ops.THREADS):
        text = cluster_ops._merge_text(2, 1, 64, "float16")
        Thread(0, tid, [BOX, SUMS, BARRIER, OUT], memory, {}).run(text)
    assert memory[None] == {OUT + 2 * i: 0.0 for i in range(32)}


@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (7, 64), (8, 128), (1, 64)])
def test_queries_are_laid_out_for_wgmma(group, head_dim):
    words = np.arange(group * head_dim // 2)  # two values each
    memory = {None: {OUT + 4 * i: w for i, w in enumerate(words)}, 0: {}}
    for tid in range(cluster_ops.THREADS):
        Thread(0, tid, [OUT, BOX], memory, {}).run(cluster_ops._load_text(group, head_dim))
    # tiles of 8 rows x 128 bytes; their 16-byte chunks are swapped by the row's number
    tiles = np.full((head_dim // 64, 8, 8, 4), -1)
    for address, word in memory[0].items():
        tiles.flat[(address - BOX) // 4] = word
    for row in range(8):
        tiles[:, row] = tiles[:, row, np.arange(8) ^ row]
    rows = tiles.transpose(1, 0, 2, 3).reshape(8, head_dim // 2)
    np.testing.assert_array_equal(rows[:group], words.reshape(group, -1))
    assert (rows[group:] == -1).all()
