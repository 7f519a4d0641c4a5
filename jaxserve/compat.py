"""Everything that depends on the version of JAX, each with the version and the reason."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator

import jax


def reserve_device_memory(fraction: float) -> None:
    """Let JAX's allocator take up to `fraction` of the device, unless the user chose otherwise.

    JAX preallocates 75% by default, which would cap the KV pool. The variable is read when the
    backend starts, so this has no effect later. All versions: 0.10.2 to 0.12.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = f"{fraction:.3f}"


def allow_pinned_memory(num_bytes: int) -> None:
    """Let JAX pin up to `num_bytes` of host memory, unless the user chose otherwise.

    XLA's GPU clients pin 64 GiB at most by default, in regions of which each is as large as all
    before it, so that the limit also bounds what is pinned and not needed. The variable is read
    when the backend starts, so this has no effect later. All versions: 0.10.2 to 0.12.
    """
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(num_bytes >> 30, 1)))


def on_backend_compile(callback: Callable[[float], None]) -> Callable[[], None]:
    """Call `callback(seconds)` after each XLA compilation of this process, on the thread that
    compiled; returns the function that stops it.

    jax.monitoring has no public way to remove one listener (0.10.2 to 0.12), so the listener stays
    and is emptied instead.
    """
    target: list[Callable[[float], None]] = [callback]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            for call in target:
                call(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return target.clear


def enable_compilation_cache(folder: str) -> None:
    """Keep every compiled program on disk, small ones and GPU autotuning results included. A
    directory that the user configured stays."""
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if configured is None:
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


CUBLAS_ROWS = 128
"""Products of so many rows are left to cuBLAS. XLA's own kernels for them, chosen by timing each
alone, win with few rows: a step of one row took 0.70 ms (0.5B) and 5.7 ms (8B), with cuBLAS alone
1.07 and 7.3; of 256 rows 2.3 against 2.05 and 14.1 against 14.0 (H100, jax 0.11.2). They are also
part of the compile time."""
CUBLAS_ROWS_QUANTIZED = 2048
"""The same where kernels are int8 or float8: for cuBLAS they are first written out in 16 bits,
which XLA's own kernels do on the way. A step of 256 rows took 22.8 ms with cuBLAS and 16.8 without,
the first token of 128 tokens 17.9 and 7.6; of 8,192 tokens XLA itself chose cuBLAS (8B, fp8, H100,
jax 0.11.2)."""


def compiler_options(
    platform: str, rows: int, *, deterministic: bool = False, quantized: bool = False
) -> dict[str, str | bool]:
    """Options of XLA for a step program that computes `rows` tokens.

    On a GPU, XLA counts the cache once more for each kernel that updates it in place, finds that
    all this does not fit the device, and recomputes small things over and over to save memory
    (jax 0.11.2: angles and page tables in each layer, and seconds of compile time). The limit that
    it compares with, in per cent of the device's memory, is therefore raised.

    deterministic: no kernels whose result depends on timing, for scatters and products, and none
    chosen by timing them, which may come out differently in every process (all versions: 0.10.2 to
    0.12). quantized: the linear kernels are int8 or float8.
    """
    if platform == "cpu":
        return {}
    options: dict[str, str | bool] = {"xla_gpu_memory_limit_slop_factor": "10000"}
    if deterministic or rows >= (CUBLAS_ROWS_QUANTIZED if quantized else CUBLAS_ROWS):
        options["xla_gpu_enable_triton_gemm"] = False
    if deterministic:
        options |= {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": "0"}
    return options


def find_mosaic_runtime() -> None:
    """Let executables with Mosaic kernels that come from disk find their runtime library.

    They look for it where an environment variable says, which JAX sets when the backend's module is
    imported (0.10.2 to 0.12); without, they are compiled anew at first use, with a page of errors.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def versions() -> str:
    """Of JAX and its compiler: programs of one are not those of another."""
    return f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"


def settings() -> str:
    """JAX's settings, which may change programs, but for those of caches, folders and logs."""
    values = jax.config.values  # pyright: ignore[reportAttributeAccessIssue]
    apart = ("cache", "dir", "log", "traceback", "profil")
    return repr(sorted((k, str(v)) for k, v in values.items() if not any(a in k for a in apart)))


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile everything in the block, whatever JAX's compilation cache holds.

    An executable that came out of that cache cannot be serialized again: it loads, and then lacks
    its functions when it runs (CPU, jax 0.10.2 and 0.12.0). Whether the cache is used is decided
    once, hence the resets.
    """
    from jax.experimental.compilation_cache import compilation_cache

    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
