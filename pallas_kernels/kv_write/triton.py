"""KV write, Pallas on the Triton backend: keys and values in one launch, in place.

Grid (ceil(T / tokens),). A program copies `tokens` rows of K*H numbers, K and V:

    k [T, K*H]   row t  ---registers--->   row slots[t] of k_pages [P*S, K*H]     (aliased)
    v [T, K*H]   row t  ---registers--->   row slots[t] of v_pages [P*S, K*H]     (aliased)

The pages are inputs and outputs at once, so nothing else of the cache moves. Rows are padded to a
power of two and masked. Slots out of range are masked too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.triton_ops import column, plt, row


def _kernel(k_ref, v_ref, slot_ref, _k_in, _v_in, k_out, v_out, *, width, tokens):
    count, used = k_ref.shape
    capacity = k_out.shape[0]
    token = pl.program_id(0) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    slot = plt.load(slot_ref.at[token], mask=token < count, other=capacity)
    columns = row(jnp.arange(width, dtype=jnp.int32), tokens)
    source, target = column(token, width), column(slot, width)
    # interpret mode scatters masked lanes too, so dead lanes must stay out of range, not clamped
    mask = (target < capacity) & (columns < used)
    for new, pages in ((k_ref, k_out), (v_ref, v_out)):
        value = plt.load(new.at[source, columns], mask=mask, other=0.0)
        plt.store(pages.at[target, columns], value, mask=mask)


def kv_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    tokens: int = 4,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See pallas_kernels.kv_write. tokens: rows a program copies, a power of two."""
    shape = k_pages.shape
    flat = (shape[0] * shape[1], shape[2] * shape[3])
    count = k.shape[0]
    out = jax.ShapeDtypeStruct(flat, k_pages.dtype)
    new_k, new_v = triton_call(
        functools.partial(_kernel, width=pl.next_power_of_2(flat[1]), tokens=tokens),
        name="kv_write",
        grid=(pl.cdiv(count, tokens),),
        out_shape=[out, out],
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        aliases={3: 0, 4: 1},
    )(
        k.reshape(count, flat[1]),
        v.reshape(count, flat[1]),
        slots,
        k_pages.reshape(flat),
        v_pages.reshape(flat),
    )
    return new_k.reshape(shape), new_v.reshape(shape)
