"""What tuned sizes of linear may depend on, for the choice of an implementation and for Triton."""

from __future__ import annotations

import jax


def features(x: jax.Array, w: jax.Array, act: str | None, transposed: bool) -> dict[str, int]:
    """size_out: columns of the result. itemsize: of w."""
    size_in, size_out = w.shape[::-1] if transposed else w.shape
    return {
        "rows": x.shape[0],
        "size_in": size_in,
        "size_out": size_out if act is None else size_out // 2,
        "gated": int(act is not None),
        "itemsize": w.dtype.itemsize,
        "transposed": int(transposed),
    }
