"""What the models leave to their caller: how products and attention are computed.

The mathematics of both is in dense.py, which serves training, export and tests; the engine passes
an implementation over a paged cache, with kernels (jaxserve.attention.paged).

Letters: T tokens, N query heads, K KV heads, H head dim, D model dim, F mlp dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static about one layer's attention."""

    layer: int
    """Its index."""
    num_heads: int
    """N."""
    num_kv_heads: int
    """K."""
    head_dim: int
    """H."""
    scale: float
    """Multiplies the scores."""
    window: int | None
    """w keeps the last w positions, the current one included; None keeps all."""
    eps: float
    """Of the RMSNorm over each head, where there is one."""
    soft_cap: float | None = None
    """Scaled scores become soft_cap * tanh(scores / soft_cap) (Gemma 2); None leaves them."""


class Residual(NamedTuple):
    """The residual stream of T tokens."""

    x: jax.Array
    """[T, D]."""
    pending: jax.Array | None = None
    """[T, D]: what the last layer adds to x, where an implementation of `Ops` leaves the sum to the
    next norm."""


class Ops(Protocol):
    """What a transformer layer does: products that read the residual stream and write to it, and
    attention. kernel [in, out], bias [out]; scale [out] float32: of a kernel that holds int8 or
    float8. Products have the dtype of what is multiplied."""

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
        """The stream, RMS-normalized with weights norm [in] (Zhang and Sennrich 2019) or as it is
        where that is None, times kernel: [T, out]; and the stream as it goes on.

        centred: each token's mean is taken out first, which makes the norm a LayerNorm without bias
        (Ba et al. 2016). Several products may read one stream, as it went on from the one before.
        act: a gated MLP's activation: kernel is gate columns, then up columns, and the result is
        act(gate) * up, [T, out / 2] (Shazeer 2020).
        """
        ...

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
        """The stream with y [T, in] times kernel added to it. Two products may write to a stream
        one after the other without one that reads it between them (a parallel block).

        norm [out]: the product, bias included, is RMS-normalized with these weights and eps before
        it is added (Gemma 2). factor: what is added is multiplied by it (Granite).
        """
        ...

    def total(self, stream: Residual) -> jax.Array:
        """The stream with what is pending of it, [T, D]: for who looks at it between layers."""
        ...

    def norm(
        self, stream: Residual, scale: jax.Array, eps: float, *, centred: bool = False
    ) -> jax.Array:
        """The stream, RMS-normalized with weights scale [D]: [T, D], behind the last layer.
        centred: see `linear_in`."""
        ...

    def attend(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        meta: Any,
        spec: AttentionSpec,
        *,
        q_norm: jax.Array | None = None,
        k_norm: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Causal attention of T new tokens, and the cache with their keys and values.

        qkv [T, (N + 2K) * H]: for each KV head the N / K heads of q that read it, then its k, then
        its v, so that a cut between KV heads cuts all three. q_norm, k_norm [H]: weights of an
        RMSNorm over each head, before q and k are rotated by cos, sin [T, H/2] float32. `cache` and
        `meta` are the caller's own. Returns [T, N * H] in qkv's dtype, and the new cache.
        """
        ...
