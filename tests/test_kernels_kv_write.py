"""kv_write: every implementation against the reference, and in place."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, kv_write
from pallas_kernels.kv_write import cases
from tests.kernels.support import (
    ON_GPU,
    fresh_seed,
    implementation,
    needs_gpu,
    quiet,
    reference,
    shape_list,
)
from tests.marks import long, long_but

pytestmark = quiet
by_name = {"ids": lambda case: case.name}
want = reference("kv_write")


def check(case, name, dtype, *, interpret=False, seed=0):
    arrays = case.inputs(seed, jnp.dtype(dtype))
    got = jax.jit(implementation("kv_write", name, interpret=interpret))(*arrays)
    for ours, theirs in zip(got, want(*arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.mark.parametrize("dtype", [long("float32"), "bfloat16"])
@pytest.mark.parametrize("case", cases.EDGES, **by_name)
def test_xla(case, dtype):
    check(case, "xla", dtype)


@pytest.mark.skipif(ON_GPU, reason="interpreting is for machines without a GPU")
@pytest.mark.parametrize(
    "case",
    long_but(cases.EDGES, "smollm", "head dim 80", "all dropped", "every slot"),
    **by_name,
)
def test_triton_interpreted(case):
    check(case, "triton", "float32", interpret=True)


def assert_in_place(compiled, cache: jax.ShapeDtypeStruct) -> None:
    """The compiled program holds no copy of the cache and gives its memory back as the output."""
    size = cache.size * cache.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size // 2
    dims = {",".join(map(str, cache.shape))}
    dims.add(",".join(map(str, (cache.shape[0] * cache.shape[1], *cache.shape[2:]))))
    dims.add(f"{cache.shape[0] * cache.shape[1]},{cache.shape[2] * cache.shape[3]}")
    for line in compiled.as_text().splitlines():
        found = re.search(r"= \w+\[([\d,]+)\]\S* copy\(", line)
        assert not (found and found.group(1) in dims), line


def in_place(name, dtype):
    case = cases.Case("in place", 3, 64, 16, 4096, 32)
    cache = jax.ShapeDtypeStruct((4096, 16, 3, 64), dtype)
    new = jax.ShapeDtypeStruct((case.tokens, 3, 64), dtype)
    slots = jax.ShapeDtypeStruct((case.tokens,), jnp.int32)
    write = implementation("kv_write", name, interpret=False)
    compiled = jax.jit(write, donate_argnums=(0, 1)).lower(cache, cache, new, new, slots).compile()
    assert_in_place(compiled, cache)


def test_xla_is_in_place():
    # float32: JAX 0.10's CPU backend converts a whole bfloat16 cache to scatter into it
    in_place("xla", jnp.float32)


@pytest.mark.parametrize("name", ["xla", "triton"])
def test_lowers_for_cuda(name):
    cache, new = ((4096, 64, 8, 128), jnp.bfloat16), ((100, 8, 128), jnp.bfloat16)
    shapes = shape_list([cache, cache, new, new, ((100,), jnp.int32)])
    text = compat.lower_for_cuda(implementation("kv_write", name, interpret=False), *shapes)
    assert ("custom_call" in text) == (name == "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((4, 3, 64), np.float32)}, "k "),
        ({"v": np.zeros((4, 2, 64), np.float16)}, "v has dtype float16"),
        ({"slots": np.zeros(4, np.float32)}, "slots"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "k_pages": np.zeros((3, 16, 2, 64), np.float32),
        "v_pages": np.zeros((3, 16, 2, 64), np.float32),
        "k": np.zeros((4, 2, 64), np.float32),
        "v": np.zeros((4, 2, 64), np.float32),
        "slots": np.zeros(4, np.int32),
    }
    with pytest.raises(ValueError, match=message):
        kv_write(**{**arguments, **change})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [*cases.EDGES, *cases.LARGE], **by_name)
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_on_device(name, case, dtype):
    check(case, name, dtype, seed=fresh_seed())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_in_place_on_device(name):
    in_place(name, jnp.bfloat16)
