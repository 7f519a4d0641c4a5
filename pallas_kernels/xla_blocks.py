"""Reading blocks of the paged cache in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def pages_per_block(page_size: int, block: int) -> int:
    """Pages that make about `block` tokens, at least one."""
    return max(1, block // page_size)


def pad_table(page_table: jax.Array, pages: int) -> jax.Array:
    """page_table [B, W] with W rounded up to whole blocks of `pages`: a clamped slice of the last
    block would read the wrong pages."""
    extra = -page_table.shape[1] % pages
    return jnp.pad(page_table, ((0, 0), (0, extra)))


def read_block(all_pages: jax.Array, pages: jax.Array) -> jax.Array:
    """The tokens of `pages` [..., n] of all_pages [P, S, K, H], as float32 [..., n * S, K, H].

    The gather takes whole pages as rows of S * K * H: XLA's CPU backend copies long rows twice as
    fast as the same pages in four dimensions (measured, jax 0.10.2).
    """
    page_size, heads, head_dim = all_pages.shape[1:]
    rows = all_pages.reshape(all_pages.shape[0], -1)
    block = rows.at[pages.reshape(-1)].get(mode="promise_in_bounds")
    shape = (*pages.shape[:-1], pages.shape[-1] * page_size, heads, head_dim)
    return block.reshape(shape).astype(jnp.float32)


def cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap * tanh(scores / soft_cap), or the scores as they are."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum in true float32: a GPU would use TF32 otherwise."""
    return jnp.einsum(
        equation, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
