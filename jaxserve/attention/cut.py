"""The operations of a model that is cut over devices: each has some heads, some of the MLP and some
of the vocabulary, and products that write to the residual stream give parts of a sum."""

from __future__ import annotations

import dataclasses

import jax

from jaxserve.attention.paged import PagedOps
from jaxserve.models.layers import rms_norm
from jaxserve.models.ops import Residual
from jaxserve.parallel.mesh import TENSOR
from pallas_kernels import all_reduce, all_reduce_add_norm


@dataclasses.dataclass(frozen=True)
class CutOps(PagedOps):
    """`PagedOps` of one device of several along the mesh axis "tensor", inside `jax.shard_map`.

    The stream is the same on all. What a product adds to it is left pending, a part of the sum, and
    summed by the next norm, which reads it (`all_reduce_add_norm`).
    """

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
        part = self._linear(y, kernel, bias=None, scale=scale)
        if bias is None and norm is None:
            return Residual(stream.x, part)
        added = all_reduce(part, None, axis_name=TENSOR)
        if bias is not None:
            added = added + bias
        if norm is not None:
            added = rms_norm(added, norm, eps)
        return Residual(stream.x + added)

    def _add_norm(
        self, stream: Residual, scale: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        assert stream.pending is not None
        return all_reduce_add_norm(stream.pending, stream.x, scale, None, eps=eps, axis_name=TENSOR)
