"""Head norms, rotary embedding and KV write in one launch, Pallas on the Triton backend.

Grid ((N + 2K) / heads, ceil(T / tokens)). A program takes `tokens` rows of `heads` heads of one
kind, so its threads all do the same; the first programs take heads of q, the next of k, the last of
v. In qkv they lie by KV head, G = N / K heads of q, then its k and its v. The two halves of a head
are two tiles [tokens, H/2], because number i is rotated with number i + H/2:

    qkv [T, K, G + 2, H]   | q q q q | k | v | q q q q | k | v | ...
                                |      |   |
    cos, sin [tokens, H/2] -> registers, once a program
                                v      v   |
                      norm?, rotate, both  |
                                v      v   v
                  q [T, N, H], row t   row slots[t] of k_pages, v_pages [P*S, K, H] (aliased)

The pages are inputs and outputs at once, so nothing else of the cache moves. qkv is read once, q, k
and v are written once. cos and sin are read once a program: with one head that is twice the bytes
of qkv, from the L2. So with many tokens a program takes several heads, and with few tokens one, for
more programs. All loads of a program are issued before its arithmetic and none waits for the slots,
only the stores do. Half a head is padded to a power of two and masked.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton_call
from pallas_kernels.device import Device, current_device
from pallas_kernels.rope_kv_write.pages import FP8, to_pages
from pallas_kernels.triton_ops import check_pages, column, plt, row
from pallas_kernels.tuning import tuned

VECTOR = 8
"""Numbers a thread holds of half a head: 16 bytes, the widest access, of a 2-byte dtype."""
FEW_TOKENS = 512
"""Up to here programs are as small as can be; above, there are enough of them anyway."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens: rows of a program, a power of two. heads: the most heads of a program; it takes the
    largest number up to this that divides K."""

    tokens: int = 1
    heads: int = 1
    num_warps: int = 1


def default_sizes(device: Device, features: dict[str, int]) -> Sizes:
    """Measured sizes for the device where there are any; else tiles that give each thread one
    vector of half a head. Few tokens: one warp a head, so that even one token makes N + 2K
    programs."""
    width = pl.next_power_of_2(features["head_dim"] // 2)
    few = features["tokens"] <= FEW_TOKENS
    heads, num_warps = (1, 1) if few else (4, 4)
    full = max(1, 32 * num_warps * VECTOR // width)
    base = Sizes(min(full, pl.next_power_of_2(features["tokens"])), heads, num_warps)
    return dataclasses.replace(base, **tuned(device, "rope_kv_write", "triton", features))


def _kernel(
    qkv_ref, cos_ref, sin_ref, slot_ref, first_page_ref, *refs,
    tokens, heads, width, page_size, eps,
):  # fmt: skip
    *norms, _k_in, _v_in, q_out, k_out, v_out = refs
    q_norm, k_norm = norms or (None, None)
    count, _, head_dim = qkv_ref.shape
    query_heads, kv_heads = q_out.shape[1], k_out.shape[1]
    capacity, half, group = k_out.shape[0], head_dim // 2, query_heads // kv_heads
    first = pl.program_id(0) * heads
    token = pl.program_id(1) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    rows, columns = column(token, width), row(jnp.arange(width, dtype=jnp.int32), tokens)
    # masks only where something is to be masked
    live = None if count % tokens == 0 else token < count
    inside = None if width == half else columns < half
    mask = inside if live is None else column(live, width)
    if live is not None and inside is not None:
        mask = mask & inside
    other = None if mask is None else 0.0

    def halves(head):
        """Of a head by its place in qkv."""
        at = jnp.full((tokens, width), head, jnp.int32)
        return [
            plt.load(qkv_ref.at[rows, at, columns + start], mask=mask, other=other)
            for start in (0, half)
        ]

    def put(out_ref, at_rows, head, pair, where):
        at = jnp.full((tokens, width), head, jnp.int32)
        for start, x in zip((0, half), pair, strict=True):
            view = out_ref.at[at_rows, at, columns + start]
            plt.store(view, to_pages(x, out_ref.dtype), mask=where)

    def angles():
        return [
            plt.load(ref.at[rows, columns], mask=mask, other=other) for ref in (cos_ref, sin_ref)
        ]

    def scales(norm_ref):
        if norm_ref is None:
            return None
        at = [columns + start for start in (0, half)]
        spare = None if inside is None else 0.0
        return [plt.load(norm_ref.at[x], mask=inside, other=spare).astype(jnp.float32) for x in at]

    def targets():
        """Rows of the pages and the mask of the stores into them."""
        dead = None if live is None else capacity
        slot = plt.load(slot_ref.at[token], mask=live, other=dead)
        slot = column(slot + first_page_ref[0] * page_size, width)
        # interpret mode scatters masked lanes too, so dead lanes stay out of range, not clamped
        kept = slot < capacity
        return slot, kept if inside is None else kept & inside

    def rotated(pair, weights, cos, sin):
        a, b = (x.astype(jnp.float32) for x in pair)
        if weights is not None:
            mean = jnp.sum(a * a + b * b, axis=1) * (1.0 / head_dim)
            shrink = column(lax.rsqrt(mean + eps), width)
            a, b = (
                (x * shrink * weight).astype(qkv_ref.dtype).astype(jnp.float32)
                for x, weight in zip((a, b), weights, strict=True)
            )
        return a * cos - b * sin, b * cos + a * sin

    @pl.when(first < query_heads)
    def _():
        # two more heads, k and v, lie behind each group
        places = [first + i + 2 * lax.div(first + i, group) for i in range(heads)]
        pairs = [halves(place) for place in places]
        (cos, sin), weights = angles(), scales(q_norm)
        for i, pair in enumerate(pairs):
            put(q_out, rows, first + i, rotated(pair, weights, cos, sin), mask)

    @pl.when((first >= query_heads) & (first < query_heads + kv_heads))
    def _():
        slot, where = targets()
        kv_heads_here = [first - query_heads + i for i in range(heads)]
        pairs = [halves(head * (group + 2) + group) for head in kv_heads_here]
        (cos, sin), weights = angles(), scales(k_norm)
        for head, pair in zip(kv_heads_here, pairs, strict=True):
            put(k_out, slot, head, rotated(pair, weights, cos, sin), where)

    @pl.when(first >= query_heads + kv_heads)
    def _():
        slot, where = targets()
        kv_heads_here = [first - query_heads - kv_heads + i for i in range(heads)]
        pairs = [halves(head * (group + 2) + group + 1) for head in kv_heads_here]
        for head, pair in zip(kv_heads_here, pairs, strict=True):
            put(v_out, slot, head, pair, where)


def _refuse(qkv: jax.Array, k_pages: jax.Array, device: Device) -> None:
    """Raises NotImplementedError with the reason for what the kernel cannot do."""
    head_dim = k_pages.shape[3]
    if qkv.shape[0] == 0:
        raise NotImplementedError("no tokens, so no programs to launch")
    if head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim} is above 256")
    if k_pages.dtype != FP8:
        return
    if device.is_cuda and device.capability < (8, 9):
        raise NotImplementedError(
            f"converting to float8_e4m3fn needs compute capability 8.9, this is {device.capability}"
        )
    check_pages(k_pages)


def rope_kv_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    first_page: jax.Array,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See pallas_kernels.rope_kv_write. interpret: run on any backend, slowly."""
    device = current_device()
    _refuse(qkv, k_pages, device)
    shape, count = k_pages.shape, qkv.shape[0]
    kv_heads, head_dim = shape[2:]
    if sizes is None:
        features = {
            "tokens": count, "heads": num_heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "itemsize": qkv.dtype.itemsize,
        }  # fmt: skip
        sizes = default_sizes(device, features)
    heads = max(n for n in range(1, min(sizes.heads, kv_heads) + 1) if kv_heads % n == 0)
    all_heads = num_heads + 2 * kv_heads
    flat = (shape[0] * shape[1], kv_heads, head_dim)
    pages = jax.ShapeDtypeStruct(flat, k_pages.dtype)
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    inputs = (
        qkv.reshape(count, all_heads, head_dim), cos, sin, slots, first_page, *norms,
        k_pages.reshape(flat), v_pages.reshape(flat),
    )  # fmt: skip
    q, new_k, new_v = triton_call(
        functools.partial(
            _kernel, tokens=sizes.tokens, heads=heads, width=pl.next_power_of_2(head_dim // 2),
            page_size=shape[1], eps=eps,
        ),
        name="rope_kv_write",
        grid=(all_heads // heads, pl.cdiv(count, sizes.tokens)),
        out_shape=[jax.ShapeDtypeStruct((count, num_heads, head_dim), qkv.dtype), pages, pages],
        num_warps=sizes.num_warps,
        num_stages=1,
        interpret=interpret,
        aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
    )(*inputs)  # fmt: skip
    return q, new_k.reshape(shape), new_v.reshape(shape)
