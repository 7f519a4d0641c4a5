"""linear: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device, current_device
from pallas_kernels.linear.activations import ACTIVATIONS, ALIASES
from pallas_kernels.linear.features import features
from pallas_kernels.registry import Implementation, Operation, cuda_only
from pallas_kernels.tuning import tuned


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """Of a product for which Triton has measured sizes (see `linear`)."""
    return ("triton", "xla") if device.is_cuda and dtype.itemsize == 2 else ("xla",)


OPERATION = Operation(
    name="linear",
    implementations=(
        Implementation("triton", "pallas_kernels.linear.triton", cuda_only),
        Implementation("xla", "pallas_kernels.linear.xla"),
    ),
    order=_order,
)

QUANTIZED = (np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn))


def linear(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    norm: jax.Array | None = None,
    eps: float = 1e-6,
    residual: jax.Array | None = None,
    act: str | None = None,
    scale: jax.Array | None = None,
    transposed: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """x times w, with what stands before and after it in a transformer layer.

    x [M, K] (bfloat16, float16 or float32). w [K, N], or [N, K] where transposed, in x's dtype, or
    int8 or float8_e4m3fn with scale [N] float32, the step of each output column. norm [K]: x is
    RMS-normalized first, x * rsqrt(mean(x^2) + eps) * norm (Zhang and Sennrich 2019). bias [N] is
    added. act ("silu", "gelu", "gelu_pytorch_tanh", "relu"; "swish" and "gelu_new" are the first
    and third): a gated MLP's (Shazeer 2020), whose w is gate columns, then up columns; the result
    is act(gate) * up and N' = N / 2, else N' = N. residual [M, N'], in x's dtype, is added last.
    implementation: a name, or names in order of preference ("triton", "xla"); None is Triton, then
    XLA, where the tuning table of this device has sizes for the product, which it has where they
    beat XLA, else XLA.

    Returns [M, N'] in x's dtype. Products are summed, and all that follows is computed, in float32;
    the normalized x, and (but in Triton) the product, are rounded to x's dtype. Raises ValueError
    for arguments that do not fit together, NotImplementedError with every reason when no
    implementation can do the case.
    """
    checks.check_dtype("x", x)
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1 if transposed else 0]:
        layout = "[N, K]" if transposed else "[K, N]"
        raise ValueError(f"x {list(x.shape)}, w {list(w.shape)}: expected [M, K] and {layout}")
    if act is not None:
        act = ALIASES.get(act, act)
        if act not in ACTIVATIONS:
            raise ValueError(f"act={act!r}: expected None or one of {', '.join(ACTIVATIONS)}")
    size_in, size_out = w.shape[::-1] if transposed else w.shape
    if act is not None and size_out % 2:
        raise ValueError(f"act={act!r} with {size_out} columns: expected as many of gate as of up")
    _check_weights(x, w, scale, size_out)
    result = (x.shape[0], size_out if act is None else size_out // 2)
    expected = (
        ("bias", bias, (size_out,), None),
        ("norm", norm, (size_in,), None),
        ("residual", residual, result, x),
    )
    for name, array, shape, like in expected:
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} {list(array.shape)}: expected {list(shape)}")
        checks.check_dtype(name, array, like)
    if implementation is None:
        alone = runs_as_one_kernel(x, w, act=act, transposed=transposed)
        implementation = None if alone else "xla"
    return OPERATION(
        x,
        w,
        bias,
        norm,
        residual,
        scale,
        eps=float(eps),
        act=act,
        transposed=transposed,
        implementation=implementation,
        dtype=x.dtype,
    )


def runs_as_one_kernel(
    x: jax.Array, w: jax.Array, *, act: str | None = None, transposed: bool = False
) -> bool:
    """Whether `linear` does this product, with what stands before and after it, in a single launch
    by default: where the tuning table has sizes for it."""
    return bool(tuned(current_device(), "linear", "triton", features(x, w, act, transposed)))


def _check_weights(x: jax.Array, w: jax.Array, scale: jax.Array | None, size_out: int) -> None:
    if scale is None:
        if w.dtype != x.dtype:
            raise ValueError(
                f"w has dtype {w.dtype}: expected {x.dtype}, as x, or int8 or float8_e4m3fn with "
                "scale"
            )
        return
    if w.dtype not in QUANTIZED:
        raise ValueError(f"w has dtype {w.dtype}: expected int8 or float8_e4m3fn to be scaled")
    checks.check_array("scale", scale, (size_out,), np.float32)
