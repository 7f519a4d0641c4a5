"""The models' operations over the paged cache: kernels from `pallas_kernels`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from jaxserve.models.ops import AttentionSpec
from jaxserve.weights import kept_transposed
from pallas_kernels import linear, paged_decode, paged_prefill, rope_kv_write


class Cache(NamedTuple):
    """What attention keeps between steps, donated.

    k, v [L * P, S, K, H]: layer l has pages l * P to (l + 1) * P, of the same numbers in each. Two
    arrays for all layers, because each donated array costs the host 14 us a step (H100, jax
    0.11.2). locks [R * K] int32: counters with which the programs of a decode kernel find out who
    is last; zero between kernels.
    """

    k: jax.Array
    v: jax.Array
    locks: jax.Array


@dataclasses.dataclass(frozen=True)
class PagedOps:
    """`models.ops.Ops` of the engine.

    attention, others: names of the implementations of attention and of everything else, None for
    the device's default order. num_pages P: of one layer. fixed_tiles: see `paged_prefill`.
    """

    attention: str | None
    others: str | None
    num_pages: int
    platform: str
    fixed_tiles: bool = False

    def linear(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        """See `Ops.linear`."""
        transposed = kept_transposed(kernel, self.platform)
        return linear(
            x, kernel.T if transposed else kernel, transposed=transposed,
            implementation=self.others, **options,
        )  # fmt: skip

    def attend(
        self, qkv: jax.Array, cos: jax.Array, sin: jax.Array, cache: Cache,
        meta: ExtendMeta | DecodeMeta, spec: AttentionSpec, *,
        q_norm: jax.Array | None = None, k_norm: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """See `Ops.attend`: writes the tokens' keys and values into their pages, then runs a paged
        kernel over everything cached. T is a step's packed tokens, or B rows of a decode step."""
        first_page = jnp.full(1, spec.layer * self.num_pages, jnp.int32)
        q, k, v = rope_kv_write(
            qkv, cos, sin, cache.k, cache.v, meta.slots, num_heads=spec.num_heads, q_norm=q_norm,
            k_norm=k_norm, eps=spec.eps, first_page=first_page, implementation=self.others,
        )  # fmt: skip
        options = {
            "scale": spec.scale, "window": spec.window, "first_page": first_page,
            "implementation": self.attention,
        }  # fmt: skip
        locks = cache.locks
        if isinstance(meta, DecodeMeta):
            out, locks = paged_decode(
                q, k, v, meta.page_table, meta.lengths, locks=locks, **options
            )
        else:
            out = paged_prefill(
                q, k, v, meta.page_table, meta.q_starts, meta.q_lens, meta.prefix_lens,
                fixed_tiles=self.fixed_tiles, **options,
            )  # fmt: skip
        return out.reshape(qkv.shape[0], -1), Cache(k, v, locks)
