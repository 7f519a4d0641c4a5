"""Programs beside the steps: copies of whole pages, and a slot's sparse lists.

Each returns (the donated arguments as they are afterwards, the rest), see `catalogue.Program`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.attention.paged import Cache
from jaxserve.sampler.state import SparseRows

COPY_WIDTH = 16
"""Pages copied by one call of the copy program."""


def in_all_layers(num_layers: int, cache: Cache, pages: jax.Array) -> jax.Array:
    """Where `pages` [C] of each layer lie in the cache's arrays: [L, C] int32. Those past a layer's
    end are past the end of all."""
    total = cache.k.shape[0]
    num_pages = total // num_layers
    first = jnp.arange(num_layers, dtype=jnp.int32)[:, None] * num_pages
    return jnp.where(pages < num_pages, first + pages, total)


def copy_pages(
    num_layers: int, cache: Cache, sources: jax.Array, targets: jax.Array
) -> tuple[tuple[Cache], None]:
    """Copy whole pages within each layer: sources, targets [C] int32, targets past a layer's end
    are dropped. A fork's last, partly filled prompt page becomes its own this way."""
    read, write = (in_all_layers(num_layers, cache, x).reshape(-1) for x in (sources, targets))
    k, v = (pages.at[write].set(pages[read], mode="drop") for pages in (cache.k, cache.v))
    return (Cache(k, v, cache.locks),), None


def gather_pages(num_layers: int, cache: Cache, pages: jax.Array) -> tuple[tuple[()], jax.Array]:
    """The content of `pages` [C] int32: [2, L, C, S, K, H], K and V."""
    rows = in_all_layers(num_layers, cache, pages)
    return (), jnp.stack([cache.k[rows], cache.v[rows]])


def scatter_pages(
    num_layers: int, cache: Cache, pages: jax.Array, content: jax.Array
) -> tuple[tuple[Cache], None]:
    """Write `content` [2, L, C, S, K, H] into `pages` [C] int32; those past a layer's end are
    dropped."""
    rows = in_all_layers(num_layers, cache, pages)
    k, v = (x.at[rows].set(new, mode="drop") for x, new in zip(cache[:2], content, strict=True))
    return (Cache(k, v, cache.locks),), None


def install_sparse(
    sparse: SparseRows,
    slot: jax.Array,
    bias_ids: jax.Array,
    bias_values: jax.Array,
    bias_until: jax.Array,
    logprob_ids: jax.Array,
) -> tuple[tuple[SparseRows], None]:
    """Write one slot's sparse lists."""
    written = SparseRows(
        sparse.bias_ids.at[slot].set(bias_ids),
        sparse.bias_values.at[slot].set(bias_values),
        sparse.bias_until.at[slot].set(bias_until),
        sparse.logprob_ids.at[slot].set(logprob_ids),
    )
    return (written,), None
