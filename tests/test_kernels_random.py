"""The XLA implementations on random lengths: one program serves all of them."""

from __future__ import annotations

from itertools import pairwise

import jax
import numpy as np
import pytest

from pallas_kernels import paged_decode, paged_prefill
from pallas_kernels.paged_decode import cases as decode_cases
from pallas_kernels.paged_prefill import cases as prefill_cases
from tests.kernels.support import assert_close, reference

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

decode_reference, prefill_reference = reference("paged_decode"), reference("paged_prefill")
_decode = jax.jit(paged_decode, static_argnames="implementation")
_prefill = jax.jit(paged_prefill, static_argnames="implementation")


def padded(pool: np.ndarray, pages: int) -> np.ndarray:
    """The pool with NaN pages up to `pages`: one shape for all examples, so one program."""
    extra = np.full((pages - len(pool), *pool.shape[1:]), np.nan, pool.dtype)
    return np.concatenate([pool, extra])


@given(lengths=st.lists(st.integers(0, 160), min_size=6, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_decode(lengths, seed):
    case = decode_cases.Case("random", 6, 2, 64, 16, tuple(lengths), width=11)
    q, k_pages, v_pages, *rest = case.inputs(seed, np.float32)
    arrays = (q, padded(k_pages, 70), padded(v_pages, 70), *rest)
    got = _decode(*arrays, implementation="xla")
    assert_close(got, decode_reference(*arrays), "float32")
    assert _decode._cache_size() == 1


@given(
    q_lens=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    prefix_lens=st.lists(st.integers(0, 90), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_prefill(q_lens, prefix_lens, seed):
    packed = sum(-(-count // 8) * 8 for count in q_lens)
    lens = (tuple(q_lens), tuple(prefix_lens))
    case = prefill_cases.Case("random", 6, 2, 64, 16, *lens, tail=288 - packed, width=11)
    q, k_pages, v_pages, *rest = case.inputs(seed, np.float32)
    arrays = (q, padded(k_pages, 48), padded(v_pages, 48), *rest)
    live = case.live()
    got = np.asarray(_prefill(*arrays, implementation="xla"))[live]
    assert_close(got, prefill_reference(*arrays)[live], "float32")
    assert _prefill._cache_size() == 1


def _xla_prefill(*arrays, **options):
    return paged_prefill(*arrays, **options, implementation="xla")


_prefill_of_blocks = jax.jit(_xla_prefill, static_argnames="window")


@st.composite
def rows_of_blocks(draw) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]:
    """Tokens of four rows, and blocks in them: each row is text and blocks in turn."""
    lens, blocks = [], []
    for row in range(4):
        parts = draw(st.lists(st.integers(0, 40), max_size=5))
        ends = np.minimum(np.cumsum([0, *parts]), 70).tolist()
        blocks += [(row, a, b - a) for a, b in list(pairwise(ends))[draw(st.booleans()) :: 2]]
        lens.append(ends[-1])
    return tuple(lens), tuple(blocks)


@pytest.mark.parametrize("window", [None, pytest.param(16, marks=pytest.mark.long)])
@given(
    rows=rows_of_blocks(),
    prefix_lens=st.lists(st.integers(0, 90), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_prefill_of_blocks(rows, prefix_lens, seed, window):
    q_lens, blocks = rows
    packed = sum(-(-count // 8) * 8 for count in q_lens)
    case = prefill_cases.Case(
        "random",
        6,
        2,
        64,
        16,
        q_lens,
        tuple(prefix_lens),
        tail=288 - packed,
        width=11,
        window=window,
        blocks=blocks,
    )
    q, k_pages, v_pages, *rest = case.inputs(seed, np.float32)
    arrays = (q, padded(k_pages, 48), padded(v_pages, 48), *rest)
    live, reach = case.live(), case.reach()
    got = np.asarray(_prefill_of_blocks(*arrays, reach=reach, window=window))[live]
    expected = prefill_reference(*arrays, reach=reach, window=window)[live]
    assert_close(got, expected, "float32")
