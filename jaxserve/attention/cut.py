"""The operations of a model that is cut over devices: each has some heads, some of the MLP and some
of the vocabulary, and products that write to the residual stream give parts of a sum."""

from __future__ import annotations

import dataclasses

import jax

from jaxserve.attention.paged import PagedOps
from jaxserve.models.layers import rms_norm, scaled
from jaxserve.models.ops import Residual
from jaxserve.parallel.mesh import TENSOR
from pallas_kernels import all_reduce, all_reduce_add_norm


@dataclasses.dataclass(frozen=True)
class CutOps(PagedOps):
    """`PagedOps` of one device of several along the mesh axis "tensor", inside `jax.shard_map`.

    The stream is the same on all. What a product adds to it is left pending, a part of the sum, and
    summed by the next norm, which reads it (`all_reduce_add_norm`).
    """

    comm: jax.Array | None = None
    """[1, COMM_WORDS] int32: where the other devices' memory is, for kernels that write there; None
    leaves sums to XLA."""

    def joined(self, comm: jax.Array | None) -> PagedOps:
        """See `PagedOps.joined`."""
        return dataclasses.replace(self, comm=comm)

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
        if bias is None and norm is None:
            return Residual(x, self._added(pending, y, kernel, scale=scale, factor=factor))
        part = self._linear(y, kernel, bias=None, scale=scale)
        added = all_reduce(part, self.comm, axis_name=TENSOR)
        if bias is not None:
            added = added + bias
        if norm is not None:
            added = rms_norm(added, norm, eps)
        return Residual(x + scaled(added, factor), pending)

    def total(self, stream: Residual) -> jax.Array:
        """See `Ops.total`. One more sum over the devices."""
        if stream.pending is None:
            return stream.x
        return stream.x + all_reduce(stream.pending, self.comm, axis_name=TENSOR)

    def all_heads(self, x: jax.Array) -> jax.Array:
        """See `PagedOps.all_heads`."""
        return jax.lax.all_gather(x, TENSOR, axis=1, tiled=True)

    def own_heads(self, x: jax.Array) -> jax.Array:
        """See `PagedOps.own_heads`."""
        width = x.shape[1] // jax.lax.axis_size(TENSOR)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * width, width, axis=1)

    def _add_norm(
        self, stream: Residual, scale: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        assert stream.pending is not None
        return all_reduce_add_norm(
            stream.pending, stream.x, scale, self.comm, eps=eps, axis_name=TENSOR
        )
