"""How many KV pages there are, and the device arrays that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.sharding import Sharding

from jaxserve.attention.paged import Cache
from jaxserve.errors import InvalidRequestError
from jaxserve.memory import available_host_memory
from jaxserve.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig

CPU_SHARE = 0.25
CPU_MOST = 2 << 30
"""On a CPU the pool is at most a quarter of the free memory, and 2 GiB unless asked for more: the
zeros are really written, and a laptop has other things to do."""
CPU_OF_WEIGHTS, CPU_ENOUGH = 4, 256 << 20
"""Unless asked for more: so many times the weights' bytes, or that many bytes where this is more.
The weights are what a checkpoint proves of its size; the context is what it claims."""
CPU_MOST_FP8 = 64 << 20
"""Unless asked for more: XLA's CPU backend scatters and gathers float8 by way of float16, all of
the pool in every layer (jax 0.10.2; 24 MiB of K take 30 ms to write into, float32 pages 20 us)."""
ALLOCATOR_FRACTION = 0.95
"""Share of a GPU's memory that JAX may take: weights, KV pages and the programs' temporaries. Of
every GPU, since JAX must know before it says which one there is."""
GRID = 4
"""Sizes of a pool per octave on a CPU. Free memory differs from start to start, and a program is
for one number of pages: without a grid nearly every start would compile anew."""


def cache_dtype(option: str, dtype: jnp.dtype) -> jnp.dtype:
    """The pages' dtype by the option `kv_cache_dtype`, where parameters and activations have
    `dtype`. InvalidRequestError for bfloat16 beside another dtype: kernels read pages in the
    queries' dtype or in fp8, nothing else."""
    match option:
        case "auto":
            return dtype
        case "fp8_e4m3":
            return jnp.dtype(jnp.float8_e4m3fn)
        case "bfloat16" | "bf16" if dtype == jnp.bfloat16:
            return dtype
    raise InvalidRequestError(
        f"kv_cache_dtype={option!r} goes with dtype='bfloat16' only, and the engine computes in "
        f"{dtype}; use 'auto' or 'fp8_e4m3'"
    )


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    row = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
    return model.num_layers * page_size * row


def count_pages(
    config: EngineConfig,
    model: ModelConfig,
    dtype: jnp.dtype,
    device: Any,
    weight_bytes: int,
    program_bytes: int,
) -> int:
    """Pages of the pool on `device`, a jax.Device.

    GPU: mem_fraction_static of the device, less the weights, and never more than what the largest
    program's temporaries and other users of this process (a second engine, say) leave. CPU: see
    CPU_SHARE, CPU_OF_WEIGHTS, CPU_MOST_FP8 and GRID. max_total_tokens caps both, and a pool larger
    than max_rows whole contexts is not needed. program_bytes: what else the engine holds, its state
    included.
    InvalidRequestError when nothing fits.
    """
    program, memory = config.program, config.memory
    each = page_bytes(model, program.page_size, dtype)
    most = program.max_rows * program.table_width
    if config.max_total_tokens is not None:
        most = min(most, max(config.max_total_tokens // program.page_size, 1))
    stats = None if memory is None else device.memory_stats()
    if memory is None or stats is None:
        left = available_host_memory() * CPU_SHARE - program_bytes
        most_bytes = CPU_MOST_FP8 if dtype.itemsize == 1 else CPU_MOST
        most_bytes = min(most_bytes, max(CPU_OF_WEIGHTS * weight_bytes, CPU_ENOUGH))
        asked = config.max_total_tokens is not None
        fits = coarse(int((left if asked else min(left, most_bytes)) // each))
    else:
        limit = stats["bytes_limit"]
        fraction = config.mem_fraction or memory.fraction
        total = limit / max(ALLOCATOR_FRACTION, fraction)  # as api.startup asked JAX to take
        others = max(stats.get("bytes_in_use", 0) - weight_bytes, 0)
        left = limit * (1 - memory.fragmented) - program_bytes - others
        fits = int((min(total * fraction, left) - weight_bytes) // each)
    if fits < 1:
        raise InvalidRequestError(
            f"no memory is left for the KV cache: weights take {weight_bytes / 2**30:.2f} GiB, one "
            f"page takes {each / 2**20:.1f} MiB, mem_fraction_static={config.mem_fraction}"
        )
    return min(most, fits)


def coarse(pages: int) -> int:
    """The largest number of GRID to an octave that is not above `pages`; below 1 as it is."""
    step = 1 << max(pages.bit_length() - GRID.bit_length(), 0)
    return pages // step * step


def make_cache(
    model: ModelConfig,
    num_pages: int,
    page_size: int,
    max_rows: int,
    dtype: jnp.dtype,
    shardings: tuple[Sharding | None, ...] = (None, None, None),
) -> Cache:
    """Empty pages, and locks for `max_rows` rows. shardings: of the arrays of a Cache; None is the
    default device."""
    shape = (model.num_layers * num_pages, page_size, model.num_kv_heads, model.head_dim)
    *pages, locks = shardings
    k, v = (jnp.zeros(shape, dtype, device=each) for each in pages)
    return Cache(k, v, jnp.zeros(max_rows * model.num_kv_heads, jnp.int32, device=locks))
