"""What an operation's bench.py hands to benchmarks/kernels.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One shape to time.

    name: of the shape. features: what tuned sizes may depend on. bytes, flops: the least a call
    must move and compute. build(key) -> (carry, fixed, rotating): call i is
    `carry = step(run, carry, fixed, rotating[i])`, so calls depend on each other, and the rotating
    inputs keep the cache's pages out of the L2 from one call to the next. calls: in one program.
    """

    name: str
    features: dict[str, int]
    bytes: float
    flops: float
    calls: int
    build: Callable[[jax.Array], tuple[Any, Arrays, list[jax.Array]]]
    step: Callable[..., Any]


def random_pools(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """K and V pages of standard normal numbers (JAX draws none in fp8: bfloat16 ones, rounded)."""
    first, second = jax.random.split(key)
    drawn = dtype if jnp.dtype(dtype).itemsize > 1 else jnp.bfloat16
    make = jax.jit(lambda k: jax.random.normal(k, shape, drawn).astype(dtype))
    return make(first), make(second)


def rotating_tables(
    key: jax.Array, *, calls: int, rows: int, live: int, width: int, pages: int
) -> list[jax.Array]:
    """`calls` page tables [rows, width] whose first `live` columns walk a shuffled pool of `pages`:
    neighbours share no page as long as the pool allows."""
    order = jax.random.permutation(key, pages).astype("int32")
    need = calls * rows * live
    order = jax.numpy.tile(order, -(-need // pages))[:need].reshape(calls, rows, live)
    tables = jax.numpy.pad(order, ((0, 0), (0, 0), (0, width - live)))
    return list(tables)
