"""The models' operations over the paged cache: kernels from `pallas_kernels`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from jaxserve.machine import Crossovers
from jaxserve.models.layers import rms_norm, scaled
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

    def joined(self, comm: jax.Array | None) -> PagedOps:
        """These operations in a step that has `comm`, the way to other devices: here there are
        none."""
        del comm
        return self

    def linear_in(
        self,
        stream: Residual,
        kernel: jax.Array,
        *,
        norm: jax.Array | None,
        eps: float,
        centred: bool = False,
        bias: jax.Array | None = None,
        act: str | None = None,
        scale: jax.Array | None = None,
    ) -> tuple[jax.Array, Residual]:
        """See `Ops.linear_in`. A centred norm is XLA's: the kernels have none."""
        if stream.pending is None and not centred:
            y = self._linear(stream.x, kernel, norm=norm, eps=eps, bias=bias, act=act, scale=scale)
            return y, stream
        x, normed = self._total_and_norm(stream, norm, eps, centred)
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
        factor: float = 1.0,
    ) -> Residual:
        """See `Ops.linear_out`."""
        x, pending = stream
        options = {"bias": bias, "scale": scale, "norm": norm, "eps": eps, "factor": factor}
        if pending is not None or self._leaves_the_sum(y, kernel):
            return Residual(x, self._added(pending, y, kernel, **options))
        return Residual(self._added(x, y, kernel, **options))

    def total(self, stream: Residual) -> jax.Array:
        """See `Ops.total`."""
        return stream.x if stream.pending is None else stream.x + stream.pending

    def all_heads(self, x: jax.Array) -> jax.Array:
        """What `attend` returns, of all heads: [T, N * H]."""
        return x

    def own_heads(self, x: jax.Array) -> jax.Array:
        """Of `all_heads`, those that this device has."""
        return x

    def norm(
        self, stream: Residual, scale: jax.Array, eps: float, *, centred: bool = False
    ) -> jax.Array:
        """See `Ops.norm`."""
        return self._total_and_norm(stream, scale, eps, centred)[1]

    def _added(
        self,
        onto: jax.Array | None,
        y: jax.Array,
        kernel: jax.Array,
        *,
        bias: jax.Array | None = None,
        scale: jax.Array | None = None,
        norm: jax.Array | None = None,
        eps: float = 0.0,
        factor: float = 1.0,
    ) -> jax.Array:
        """onto [T, out], if there is any, with what `linear_out` adds."""
        if norm is None and factor == 1:
            return self._linear(y, kernel, residual=onto, bias=bias, scale=scale)
        made = self._linear(y, kernel, bias=bias, scale=scale)
        if norm is not None:
            made = rms_norm(made, norm, eps)
        made = scaled(made, factor)
        return made if onto is None else onto + made

    def _total_and_norm(
        self, stream: Residual, norm: jax.Array | None, eps: float, centred: bool
    ) -> tuple[jax.Array, jax.Array]:
        """`total`, and that through a norm, if there is one."""
        if stream.pending is not None and norm is not None and not centred:
            return self._add_norm(stream, norm, eps)
        x = self.total(stream)
        return x, x if norm is None else rms_norm(x, norm, eps, centred=centred)

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
                reach=meta.reach,
                fixed_tiles=self.fixed_tiles,
                **options,
            )
        return out.reshape(qkv.shape[0], -1), Cache(k, v, locks)
