"""rope_kv_write: the public function and its default orders."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from pallas_kernels.device import Device
from pallas_kernels.registry import Implementation, Operation, cuda_only
from pallas_kernels.rope_kv_write.pages import FP8


def _order(device: Device, dtype: np.dtype) -> tuple[str, ...]:
    """One launch instead of XLA's six, which take 9 us a layer at B=1 (H100)."""
    del dtype
    return ("triton", "xla") if device.is_cuda else ("xla",)


OPERATION = Operation(
    name="rope_kv_write",
    implementations=(
        Implementation("triton", "pallas_kernels.rope_kv_write.triton", cuda_only),
        Implementation("xla", "pallas_kernels.rope_kv_write.xla"),
    ),
    order=_order,
)


def rope_kv_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    *,
    num_heads: int,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 1e-6,
    first_page: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split a fused projection, rotate q and k, and store k and v in the cache; in place when the
    pages are donated.

    qkv [T, (N + 2K) * H] (bfloat16, float16 or float32): for each of K KV heads the N / K query
    heads that read it (N = num_heads, a multiple of K), then its key, then its value, so that a cut
    between KV heads leaves parts of the same form. cos, sin [T, H/2] float32, with any scaling in
    them; numbers i and i + H/2 of a head are rotated together (RoFormer, Su et al. 2021, in the
    order of Hugging Face).
    k_pages, v_pages [P, S, K, H] in qkv's dtype, or float8_e4m3fn, to which numbers are clipped
    (+-448). slots [T] int32: positions in the flat P * S; those at P * S or above are dropped, so
    padding goes there (below 2**30); the others must differ from each other and not be negative.
    q_norm, k_norm [H], both or neither: scales of an RMSNorm with `eps` over each q and k head,
    rounded to qkv's dtype before the rotation (Qwen3). Norm and rotation are float32.
    first_page [1] int32: the slots count from this page (0 if None): where one array holds the
    pages of all layers, those of one layer.
    implementation: a name, or names in order of preference ("triton", "xla"); None is the default
    order of this device.

    Returns (q [T, N, H] in qkv's dtype, k_pages, v_pages). Raises ValueError for arguments that do
    not fit together, NotImplementedError with every reason when no implementation can do the case.
    """
    checks.check_dtype("qkv", qkv)
    if k_pages.dtype != FP8:
        checks.check_dtype("k_pages", k_pages, qkv)
    checks.check_pages(k_pages, v_pages)
    kv_heads, head_dim = k_pages.shape[2:]
    tokens = slots.shape[0]
    expected = (tokens, (num_heads + 2 * kv_heads) * head_dim)
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads={num_heads}: expected a multiple of k_pages' {kv_heads} heads")
    if qkv.shape != expected:
        raise ValueError(
            f"qkv {list(qkv.shape)}: expected {list(expected)} for num_heads={num_heads} and "
            f"k_pages {list(k_pages.shape)}"
        )
    if head_dim % 2:
        raise ValueError(f"k_pages {list(k_pages.shape)}: expected an even head dim to rotate")
    for name, array in (("cos", cos), ("sin", sin)):
        checks.check_array(name, array, (tokens, head_dim // 2), np.float32)
    checks.check_int32("slots", slots, (tokens,))
    if first_page is not None:
        checks.check_int32("first_page", first_page, (1,))
    norms: tuple[jax.Array, ...] = ()
    if q_norm is not None and k_norm is not None:
        norms = (q_norm, k_norm)
    elif q_norm is not None or k_norm is not None:
        raise ValueError("q_norm and k_norm: expected both or neither")
    for name, array in zip(("q_norm", "k_norm"), norms, strict=False):
        if array.shape != (head_dim,):
            raise ValueError(f"{name} {list(array.shape)}: expected [{head_dim}]")
        checks.check_dtype(name, array)
    return OPERATION(
        qkv,
        cos,
        sin,
        k_pages,
        v_pages,
        slots,
        np.zeros(1, np.int32) if first_page is None else first_page,
        *norms,
        num_heads=num_heads,
        eps=float(eps),
        implementation=implementation,
        dtype=qkv.dtype,
    )
