"""The XLA implementations on random lengths: one program serves all of them."""

from __future__ import annotations

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
