"""The one entry to attention: writes this step's keys and values, then runs a paged kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from pallas_kernels import kv_write, paged_decode, paged_prefill

LayerCache = tuple[jax.Array, jax.Array]
"""K and V pages of one layer, each [P, S, K, H]."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, meta: ExtendMeta | DecodeMeta,
    *, scale: float, window: int | None, implementation: str | None = None,
) -> tuple[jax.Array, LayerCache]:  # fmt: skip
    """Causal attention of q [T, N, H] over the cached tokens and k, v [T, K, H].

    window: how many last positions a token sees, itself included; None sees all.
    implementation: a kernel's name, None for the default order of this device.
    Returns the output [T, N, H] in q's dtype, and the cache with k and v written.
    """
    k_pages, v_pages = kv_write(*cache, k, v, meta.slots)
    kernel = functools.partial(
        paged_decode if isinstance(meta, DecodeMeta) else paged_prefill,
        scale=scale,
        window=window,
        implementation=implementation,
    )
    if isinstance(meta, DecodeMeta):
        out = kernel(q, k_pages, v_pages, meta.page_table, meta.lengths)
    else:
        out = kernel(
            q, k_pages, v_pages, meta.page_table, meta.q_starts, meta.q_lens, meta.prefix_lens
        )
    return out, (k_pages, v_pages)


def make_attend(implementation: str | None) -> Callable[..., tuple[jax.Array, LayerCache]]:
    """`attend` with the engine's choice of kernel bound."""
    return functools.partial(attend, implementation=implementation)
