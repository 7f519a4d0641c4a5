"""The models' operations over the paged cache: kernels from `pallas_kernels`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from jaxserve.machine import Crossovers
from jaxserve.models.layers import rms_norm
from jaxserve.models.ops import AttentionSpec, Residual
from jaxserve.weights import kept_transposed
from pallas_kernels import (
    add_norm,
    linear,
    paged_decode,
    paged_prefill,
    rope_kv_write,
    runs_as_one_kernel,
)


class Cache(NamedTuple):
    """What attention keeps between steps, donated. Two arrays for all layers, because each donated
    array costs the host 14 us a step (H100, jax 0.11.2)."""

    k: jax.Array
    """[L * P, S, K, H]: layer l has pages l * P to (l + 1) * P, of the same numbers in each."""
    v: jax.Array
    """As k."""
    locks: jax.Array
    """[R * K] int32: counters with which the programs of a decode kernel find out who is last; zero
    between kernels."""


@dataclasses.dataclass(frozen=True)
class PagedOps:
    """`models.ops.Ops` of the engine."""

    attention: str | None
    """Name of the implementation of attention; None is the device's default order."""
    others: str | None
    """The same of everything else."""
    num_pages: int
    """P, of one layer."""
    crossovers: Crossovers
    """Of the device."""
    fixed_tiles: bool = False
    """See `paged_prefill`."""

    def linear_in(
        self,
        stream: Residual,
        kernel: jax.Array,
        *,
        norm: jax.Array,
        eps: float,
        bias: jax.Array | None = None,
        act: str | None = None,
        scale: jax.Array | None = None,
    ) -> tuple[jax.Array, Residual]:
        """See `Ops.linear_in`."""
        if stream.pending is None:
            y = self._linear(stream.x, kernel, norm=norm, eps=eps, bias=bias, act=act, scale=scale)
            return y, stream
        x, normed = self._add_norm(stream, norm, eps)
        return self._linear(normed, kernel, bias=bias, act=act, scale=scale), Residual(x)

    def linear_out(
        self,
        y: jax.Array,
        kernel: jax.Array,
        stream: Residual,
        *,
        bias: jax.Array | None = None,
        scale: jax.Array | None = None,
        norm: jax.Array | None = None,
        eps: float = 0.0,
    ) -> Residual:
        """See `Ops.linear_out`."""
        assert stream.pending is None, "a product has read this stream, and so its pending part"
        leaves_the_sum = self._leaves_the_sum(y, kernel)
        if norm is None and not leaves_the_sum:
            return Residual(self._linear(y, kernel, residual=stream.x, bias=bias, scale=scale))
        added = self._linear(y, kernel, bias=bias, scale=scale)
        if norm is not None:
            added = rms_norm(added, norm, eps)
        return Residual(stream.x, added) if leaves_the_sum else Residual(stream.x + added)

    def norm(self, stream: Residual, scale: jax.Array, eps: float) -> jax.Array:
        """See `Ops.norm`."""
        if stream.pending is None:
            return rms_norm(stream.x, scale, eps)
        return self._add_norm(stream, scale, eps)[1]

    def _add_norm(
        self, stream: Residual, scale: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        assert stream.pending is not None
        return add_norm(stream.x, stream.pending, scale, eps=eps, implementation=self.others)

    def _leaves_the_sum(self, y: jax.Array, kernel: jax.Array) -> bool:
        """Whether the sum is made with the next norm: where Triton kernels are, and the product is
        none of them, which would add it on the way."""
        least = self.crossovers.summed_rows
        if least is None or self.others is not None or y.shape[0] < least:
            return False
        kept, transposed = self._as_kept(kernel)
        return not runs_as_one_kernel(y, kept, transposed=transposed)

    def _linear(
        self,
        x: jax.Array,
        kernel: jax.Array,
        *,
        bias: jax.Array | None,
        scale: jax.Array | None,
        norm: jax.Array | None = None,
        eps: float = 0.0,
        act: str | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        kept, transposed = self._as_kept(kernel)
        return linear(
            x,
            kept,
            bias=bias,
            norm=norm,
            eps=eps,
            residual=residual,
            act=act,
            scale=scale,
            transposed=transposed,
            implementation=self.others,
        )

    def _as_kept(self, kernel: jax.Array) -> tuple[jax.Array, bool]:
        """`kernel` [in, out] as it lies in memory, and whether that is [out, in]."""
        transposed = kept_transposed(kernel, self.crossovers)
        return kernel.T if transposed else kernel, transposed

    def attend(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: Cache,
        meta: ExtendMeta | DecodeMeta,
        spec: AttentionSpec,
        *,
        q_norm: jax.Array | None = None,
        k_norm: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """See `Ops.attend`: writes the tokens' keys and values into their pages, then runs a paged
        kernel over everything cached. T is a step's packed tokens, or B rows of a decode step."""
        first_page = jnp.full(1, spec.layer * self.num_pages, jnp.int32)
        q, k, v = rope_kv_write(
            qkv,
            cos,
            sin,
            cache.k,
            cache.v,
            meta.slots,
            num_heads=spec.num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=spec.eps,
            first_page=first_page,
            implementation=self.others,
        )
        options = {
            "scale": spec.scale,
            "window": spec.window,
            "soft_cap": spec.soft_cap,
            "first_page": first_page,
            "implementation": self.attention,
        }
        locks = cache.locks
        if isinstance(meta, DecodeMeta):
            out, locks = paged_decode(
                q, k, v, meta.page_table, meta.lengths, locks=locks, **options
            )
        else:
            out = paged_prefill(
                q,
                k,
                v,
                meta.page_table,
                meta.q_starts,
                meta.q_lens,
                meta.prefix_lens,
                fixed_tiles=self.fixed_tiles,
                **options,
            )
        return out.reshape(qkv.shape[0], -1), Cache(k, v, locks)
