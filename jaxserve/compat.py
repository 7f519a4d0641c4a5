"""Everything that depends on the version of JAX, each with the version and the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

OWN_SETTINGS: dict[str, Any] = {
    "enable_x64": False,
    "numpy_rank_promotion": "allow",
    "numpy_dtype_promotion": "standard",
    "disable_jit": False,
    "default_prng_impl": "threefry2x32",
    "enable_custom_prng": False,
    "threefry_partitionable": True,
    "transfer_guard": "allow",
    "thread_guard": False,
    "no_tracing": False,
    "no_execution": False,
    "check_tracer_leaks": False,
    "debug_nans": False,
    "debug_infs": False,
    "debug_key_reuse": False,
}
"""What the engine's code is written for: JAX's defaults, by the context managers of these names."""
USER_SETTINGS = ("default_device", "default_matmul_precision")
"""The user's choice as it is when the engine is built."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """JAX's settings for everything that one engine runs, whatever the program around it sets, when
    and for which thread."""

    values: dict[str, Any]

    @classmethod
    def here(cls) -> Settings:
        """OWN_SETTINGS, and USER_SETTINGS as they are for the calling thread."""
        return cls(
            {**OWN_SETTINGS, **{name: getattr(jax.config, f"jax_{name}") for name in USER_SETTINGS}}
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In force on the calling thread alone, for the block. (Which of these context managers
        there are depends on the version; 0.10.2 has all.)"""
        with contextlib.ExitStack() as stack:
            for name, value in self.values.items():
                if hasattr(jax, name):
                    stack.enter_context(getattr(jax, name)(value))
            yield


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


def cache_configured() -> bool:
    """Whether the program has given JAX a folder for its compilation cache, or turned it off."""
    config: Any = jax.config
    return config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache


CACHE_DEFAULTS = {
    "jax_compilation_cache_max_size": -1,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
"""JAX's own (0.10.2 to 0.12)."""


def cache_limited() -> bool:
    """Whether the program has decided how large JAX's compilation cache may become."""
    return _chosen("jax_compilation_cache_max_size")


def enable_compilation_cache(folder: str | None) -> None:
    """Keep every compiled program on disk, small ones and GPU autotuning results included. None:
    where the program has configured it. Limits that it has set stay too."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)
    for name in ("min_compile_time_secs", "min_entry_size_bytes"):
        if not _chosen(f"jax_persistent_cache_{name}"):
            jax.config.update(f"jax_persistent_cache_{name}", 0)


def _chosen(name: str) -> bool:
    """Whether a setting has another value than JAX's default, or has one by the environment."""
    return getattr(jax.config, name) != CACHE_DEFAULTS[name] or name.upper() in os.environ


def find_mosaic_runtime() -> None:
    """Let executables with Mosaic kernels that come from disk find their runtime library.

    They look for it where an environment variable says, which JAX sets when the backend's module is
    imported (0.10.2 to 0.12); without, they are compiled anew at first use, with a page of errors.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def load_executable(
    serialized: Sequence[Any], places: list[int], devices: list[Any], options: Mapping[str, Any]
) -> Any:
    """A program of jax.experimental.serialize_executable, for `devices`, whichever of the same kind
    it was compiled for. serialized: what `serialize` returned. places: the ids of the devices then,
    in the order of `devices`. options: of the compiler.

    JAX's own way needs those very devices (0.10.2 to 0.12): it looks them up by their ids, and a
    CPU's program goes back to where it was compiled. A program takes the devices of the compiler's
    options, where it is given any; so does what JAX's cache keeps for all GPUs of a kind.
    """
    content, in_tree, out_tree = serialized
    client = devices[0].client
    if places == [device.id for device in devices]:
        return serialize_executable.deserialize_and_load(
            content, in_tree, out_tree, backend=client, execution_devices=devices
        )
    from jax._src import compiler  # no public name makes these options

    assignment = np.array([[device.id for device in devices]])
    elsewhere = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=assignment,
        env_options_overrides=dict(options),
    )

    class Unpickler(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, pid: Any) -> Any:
            if pid[0] != "exec":
                return super().persistent_load(pid)
            return client.deserialize_executable(
                pid[1],
                executable_devices=self.execution_devices,
                compile_options=elsewhere,
            )

    unpickler = Unpickler(io.BytesIO(content), client, devices)
    unpickler.devices_by_id = dict(zip(places, devices, strict=True))
    unloaded, args_info, no_kwargs = unpickler.load()
    return jax.stages.Compiled(
        unloaded.load(), [], in_tree.unflatten(args_info), out_tree, no_kwargs=no_kwargs
    )


def platforms() -> str | None:
    """What the program allows JAX to use; None is everything."""
    return jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]


def versions() -> str:
    """Of JAX and its compiler: programs of one are not those of another."""
    return f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"


def settings() -> str:
    """JAX's settings for the calling thread, which may change programs, but for those of caches,
    folders, logs and guards. With `Settings` in force its values are among them, so that the
    program's own ones make no other programs."""
    values = jax.config.values  # pyright: ignore[reportAttributeAccessIssue]
    apart = ("cache", "dir", "log", "traceback", "profil", "guard", "platform")
    return repr(sorted((k, str(v)) for k, v in values.items() if not any(a in k for a in apart)))


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile everything in the block, whatever JAX's compilation cache holds.

    An executable that came out of that cache cannot be serialized again: it loads, and then lacks
    its functions when it runs (CPU, jax 0.10.2 and 0.12.0). Whether the cache is used is decided
    once, hence the resets. Blocks of several threads may overlap: it is back after the last.
    """
    with _cache_off.lock:
        if not _cache_off.blocks:
            config: Any = jax.config
            _cache_off.wanted = config.jax_enable_compilation_cache
            _use_compilation_cache(False)
        _cache_off.blocks += 1
    try:
        yield
    finally:
        with _cache_off.lock:
            _cache_off.blocks -= 1
            if not _cache_off.blocks:
                _use_compilation_cache(_cache_off.wanted)


class _CacheOff:
    """Who does without JAX's compilation cache at the moment."""

    lock = threading.Lock()
    blocks = 0
    wanted = True
    """Whether it was in use before."""


_cache_off = _CacheOff()


def _use_compilation_cache(wanted: bool) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_enable_compilation_cache != wanted:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_enable_compilation_cache", wanted)
        compilation_cache.reset_cache()
